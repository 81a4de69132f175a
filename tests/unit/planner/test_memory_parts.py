"""Sizes as users write them and as they are shown."""

from __future__ import annotations

import pytest

from qdora.errors import InputError
from qdora.planner.report import Breakdown, Part
from qdora.resources import parse_size, show_size


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("24GiB", 24 * 2**30),
        ("24GB", 24 * 10**9),
        ("24 gib", 24 * 2**30),
        (" 1.5TiB ", 3 * 2**39),
        ("80000MB", 80 * 10**9),
        ("512KiB", 2**19),
        ("7B", 7),
    ],
)
def test_sizes_are_read_in_their_unit(text, count):
    """Catches: GB taken for GiB (7% on a card), a unit that is not known, a fraction cut off."""
    assert parse_size(text, "--gpu-memory") == count


@pytest.mark.parametrize(
    "text", ["24", "GiB", "24 potatoes", "-24GiB", "0GB", "24GiB 24GiB", "", "24 G", "1e3GB"]
)
def test_anything_else_is_an_error_with_the_allowed_forms(text):
    """Catches: a number without a unit that is guessed, a size of nothing, a traceback."""
    with pytest.raises(InputError, match=r"--gpu-memory .*24GiB .*24GB .*allowed units: B, KB, KiB") as error:
        parse_size(text, "--gpu-memory")
    assert repr(text) in str(error.value)


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (3 * 2**29, "1.50 GiB"), (5 * 2**40, "5.00 TiB")]
)
def test_sizes_are_shown_in_the_unit_that_fits(count, text):
    """Catches: a unit off by a factor of 1024."""
    assert show_size(count) == text


def test_a_breakdown_knows_every_kind_and_adds_up():
    """Catches: a kind that is missing where nothing of it is there, a total without one."""
    parts = Breakdown({Part.WEIGHTS: 5, Part.LOGITS: 2})
    assert set(parts) == set(Part)
    assert parts[Part.TILES] == 0
    assert parts.total == 7
