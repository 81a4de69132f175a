"""Overlays: which settings win, what is refused, and where the comparison is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from qdora.config_file import check_config
from qdora.errors import InputError
from qdora.experiments.arms import CompareConfig, expand
from qdora.experiments.overlay import OverlayConfig, load_comparison, overlaid

from .runs import run_tree


def comparison_of(*arms: dict[str, Any], **keys: Any) -> CompareConfig:
    comparison = {"base": "b.yaml", "arms": list(arms), "output": {"dir": "runs/c"}, **keys}
    return check_config(comparison, CompareConfig, "test")


def overlay_of(**keys: Any) -> OverlayConfig:
    return check_config(keys, OverlayConfig, "test")


def test_an_overlay_comes_between_the_comparison_and_the_arms_and_its_own_arms_last():
    """Catches: an overlay that takes from the arms what they differ in, or that loses against either."""
    comparison = comparison_of(
        {"name": "lora-a", "set": {"adapter.r": 4}},
        {"name": "dora-a", "set": {"adapter.r": 8}},
        {"name": "dora-b"},
        set={"adapter.r": 32, "adapter.alpha": 5.0, "training.learning_rate": 1e-3},
    )
    overlay = overlay_of(
        set={"adapter.r": 16, "adapter.alpha": 6.0},
        arms={"dora-*": {"training.batch_size": 4}, "*-a": {"adapter.alpha": 7.0}},
    )
    runs = [run.config for run in expand(run_tree(), overlaid(comparison, overlay, "o.yaml"))]
    assert [config.adapter.r for config in runs] == [4, 8, 16]
    assert [config.adapter.alpha for config in runs] == [7, 7, 6]
    assert [config.training.batch_size for config in runs] == [16, 4, 4]
    assert {config.training.learning_rate for config in runs} == {1e-3}


def test_a_section_replaces_the_keys_in_it_whatever_their_order():
    """Catches: a key of the comparison, set below a section, that stays on top of the overlay's section."""
    data = {"source": "synthetic", "count": 30}
    comparison = comparison_of(
        {"name": "a"},
        {"name": "b", "set": {"data.train.limit": 5}},
        set={"data.train": data, "data.train.limit": 9},
    )
    overlay = overlay_of(set={"data.train": {**data, "count": 20}}, arms={"b": {"data.train": data}})
    runs = [run.config.data.train for run in expand(run_tree(), overlaid(comparison, overlay, "o.yaml"))]
    assert [(run.count, run.limit) for run in runs] == [(20, None), (30, None)]


def test_an_arm_with_declared_axes_may_differ_in_what_the_overlay_sets():
    """Catches: an overlay that cannot be used with arms that say in what they may differ."""
    arm = {"name": "b", "set": {"adapter.r": 4}, "may_differ": ["adapter"]}
    found = overlaid(
        comparison_of({"name": "a"}, arm), overlay_of(arms={"b": {"training.batch_size": 4}}), "o"
    )
    assert expand(run_tree(), found)[1].config.training.batch_size == 4


@pytest.mark.parametrize(
    ("overlay", "message"),
    [
        ({"arms": {"lroa*": {}}}, r"o.yaml: arms: 'lroa\*' matches none; did you mean 'lora'\?"),
        (
            {"arms": {"*": {"evaluation.limit": 3}}},
            "o.yaml: .*arm 'lora' sets evaluation.limit, which an arm",
        ),
        (
            {"arms": {"dora": {"output.dir": "x"}}},
            "o.yaml: .*arm 'dora' sets output, which an arm may not",
        ),
    ],
)
def test_a_wrong_overlay_is_refused_by_name(overlay, message):
    """Catches: a pattern with a typo that silently changes nothing; a key that no arm may set."""
    comparison = comparison_of({"name": "lora"}, {"name": "dora"})
    with pytest.raises(InputError, match=message):
        overlaid(comparison, overlay_of(**overlay), "o.yaml")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A comparison in a folder of its own, with two overlays, and one that it does not name."""
    tree = {
        "base": "b.yaml",
        "arms": [{"name": "a"}, {"name": "b", "set": {"adapter.r": 4}}],
        "output": {"dir": "runs/c"},
        "small": ["o/one.yaml", "o/two.yaml"],
        "published": {"b": {"synthetic": 50.0}},
        "published_source": "a paper",
    }
    (tmp_path / "o").mkdir()
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(tree))
    (tmp_path / "plain.yaml").write_text(yaml.safe_dump({k: v for k, v in tree.items() if k != "small"}))
    for name, settings in {
        "o/one": {"set": {"training.max_steps": 1, "training.batch_size": 1}},
        "o/two": {"set": {"training.max_steps": 2}},
        "three": {"set": {"training.warmup_steps": 3}, "arms": {"a": {"adapter.r": 8}}},
        "typo": {"sett": {}},
    }.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


def load(folder: Path, *overrides: str, overlays: tuple[str, ...] = (), small: bool = False) -> CompareConfig:
    named = [str(folder / name) for name in overlays]
    return load_comparison(folder / "compare.yaml", overrides, named, small=small)


def test_small_takes_the_named_overlays_in_order_then_the_options(files):
    """Catches: an earlier overlay on top of a later one; overlays looked for in the working directory."""
    plain = {"training.max_steps": 2, "training.batch_size": 1}
    assert load(files).set == {}
    assert load(files, small=True).set == plain
    both = load(files, small=True, overlays=("three.yaml",))
    assert both.set == {**plain, "training.warmup_steps": 3}
    assert both.arms[0].set == {"adapter.r": 8}


def test_an_overlaid_comparison_has_a_directory_of_its_own(files):
    """Catches: a small run that is taken for the large one, or that overwrites it; --set without effect."""
    assert load(files).output.dir == "runs/c"
    assert load(files, small=True).output.dir == "runs/c-small"
    assert load(files, overlays=("three.yaml",)).output.dir == "runs/c-three"
    assert load(files, small=True, overlays=("three.yaml",)).output.dir == "runs/c-small-three"
    assert load(files, "output.dir=runs/d", "seeds=[4]", small=True).output.dir == "runs/d"
    assert load(files, "output.dir=runs/d", "seeds=[4]", small=True).seeds == (4,)


def test_published_numbers_are_not_those_of_an_overlay(files):
    """Catches: a paper's numbers for a 7B model beside those of a small one."""
    assert load(files).published == {"b": {"synthetic": 50.0}}
    assert load(files, small=True).published == {}


@pytest.mark.parametrize(
    ("config", "overlays", "small", "message"),
    [
        ("plain.yaml", (), True, "--small: .*plain.yaml names no overlays under the key 'small'"),
        ("compare.yaml", ("none.yaml",), False, "none.yaml: no such configuration file"),
        ("compare.yaml", ("typo.yaml",), False, "typo.yaml: unknown key 'sett'.*did you mean 'set'"),
    ],
)
def test_what_is_missing_is_named(files, config, overlays, small, message):
    """Catches: `--small` that trains the large comparison; a missing overlay passed over."""
    with pytest.raises(InputError, match=message):
        load_comparison(files / config, [], [str(files / name) for name in overlays], small=small)
