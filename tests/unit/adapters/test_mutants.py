"""Each named bug makes its named test fail: see tests/mutants."""

from __future__ import annotations

import pytest

from tests.mutants import MUTANTS
from tests.mutation import ROOT, fails


@pytest.mark.parametrize("name", [name for name, mutant in MUTANTS.items() if not mutant.slow])
def test_the_bug_is_caught(name):
    """Catches: a test that passes whatever the code does."""
    if "triton" in MUTANTS[name].file:
        pytest.importorskip("triton")
    assert fails(MUTANTS[name], MUTANTS[name].test)


def test_the_bugs_are_where_they_were():
    """Catches: a mutant whose place was rewritten, so that it puts in nothing."""
    for name, mutant in MUTANTS.items():
        assert (ROOT / "qdora" / mutant.file).read_text(encoding="utf-8").count(mutant.old) == 1, name
