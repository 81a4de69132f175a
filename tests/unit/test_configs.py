"""Every configuration that ships goes through the real parser."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from qdora import config as schema
from qdora.commands.compare import arm_config
from qdora.config import CompareConfig, Section, load_config, read_yaml
from qdora.errors import InputError

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def kind_of(path: Path) -> str:
    return path.parent.name if path.parent.name in ("compare", "accelerate") else "run"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT)))
def test_parses(path):
    """Catches: a shipped configuration with a key that was renamed, or a combination that is refused."""
    if kind_of(path) == "accelerate":
        assert load_config_from_file(str(path)).mixed_precision == "no"
    elif kind_of(path) == "compare":
        comparison = load_config(path, [], CompareConfig)
        tree = read_yaml(path.parent / comparison.base)
        for arm in comparison.arms:
            assert arm_config(tree, comparison, arm, 0).adapter.method == arm.method
    else:
        load_config(path)


def test_a_typo_in_a_shipped_file_would_be_seen():
    """Catches: a parser that lets unknown keys through, so that the test above means nothing."""
    with pytest.raises(InputError, match=r"unknown key 'training\.lr'"):
        load_config(ROOT / "configs" / "quickstart.yaml", ["training.lr=1"])


def test_every_key_is_documented():
    """Catches: a key that the reference page does not know."""
    page = (ROOT / "docs" / "configuration.md").read_text()
    sections = [v for v in vars(schema).values() if isinstance(v, type) and issubclass(v, Section)]
    keys = {name for section in sections for name in section.model_fields}
    assert not [key for key in sorted(keys) if f"`{key}`" not in page]
