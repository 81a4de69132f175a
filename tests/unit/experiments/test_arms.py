"""Which runs make a comparison: keys that may differ, conditions that must not, runs that go on."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from qdora.config import RunConfig
from qdora.config_file import check_config
from qdora.errors import InputError
from qdora.experiments.arms import (
    ArmRun,
    CompareConfig,
    check_conditions,
    differences,
    expand,
    resumed,
)

from .runs import manifest_of, run_config, run_tree

FULL = {"training.mode": "full", "model.quantization": "none"}


def runs_of(*arms: dict[str, Any], tree: dict[str, Any] | None = None, **keys: Any) -> list[ArmRun]:
    comparison = {"base": "b.yaml", "arms": list(arms), "output": {"dir": "runs/c"}, **keys}
    return expand(tree or run_tree(), check_config(comparison, CompareConfig, "test"))


def test_any_keys_make_arms():
    """Catches: an axis that arms cannot differ in, a setting lost, arms in one folder."""
    settings = [
        {},
        {"adapter.dora": False},
        {"model.quantization": "none"},
        {"adapter.r": 8, "adapter.init": "gaussian"},
        {"training.learning_rate": 1e-3},
        {"data.train.limit": 9},
        {"adapter.rank_pattern": {"q_proj": 4}},
        {**FULL, "adapter": {"type": "none", "dora": False}},
    ]
    runs = runs_of(*({"name": f"a{i}", "set": given} for i, given in enumerate(settings)), seeds=[3, 5])
    assert [(run.arm, run.seed) for run in runs] == [(f"a{i}", s) for s in (3, 5) for i in range(8)]
    assert len({run.directory.path for run in runs}) == 16
    assert runs[10].config.model.quantization == "none"
    assert runs[10].config.training.seed == 5
    assert differences([runs[0].config, runs[11].config]) == {
        "adapter.init": ["kaiming", "gaussian"],
        "adapter.r": [16, 8],
    }
    assert runs[14].config.adapter.rank_pattern == {"q_proj": 4}


def test_settings_of_the_comparison_hold_for_all_arms_that_do_not_override_them():
    """Catches: a shared setting that wins over an arm's own, or reaches the first arm only."""
    arms = {"name": "a"}, {"name": "b", "set": {"adapter.r": 4}}
    runs = runs_of(*arms, set={"adapter.r": 8, "adapter.alpha": 5.0})
    assert [run.config.adapter.r for run in runs] == [8, 4]
    assert [run.config.adapter.alpha for run in runs] == [5, 5]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapter.rr": 4}, "b.yaml with arm 'b': unknown key 'adapter.rr' .*did you mean 'r'"),
        ({"adaptor.r": 4}, "arm 'b': unknown key 'adaptor' .*did you mean 'adapter'"),
        ({"adapter.r.x": 4}, "arm 'b': unknown key|arm 'b': .*'r' holds|arm 'b': adapter.r"),
        ({"model.path.x": 4}, "arm 'b': .*'path' holds 'some/model'"),
        ({"adapter.method": "qlora"}, "arm 'b': key 'adapter.method' is now adapter.type"),
        (
            {"training.mode": "full"},
            "arm 'b': training.mode 'full' does not go with model.quantization 'nf4'",
        ),
        ({"adapter.init": "orthogonal", "adapter.r": 3}, "arm 'b': .*adapter.r must be even"),
    ],
)
def test_a_wrong_setting_is_refused_with_its_arm(settings, message):
    """Catches: an arm that is found to be impossible when the arms before it have been trained."""
    with pytest.raises(InputError, match=message):
        runs_of({"name": "a"}, {"name": "b", "set": settings})


def test_a_task_called_as_the_mean_is_refused():
    """Catches: a task of the user's own that the report would show in place of the mean over tasks."""
    tree = run_tree()
    own = {"source": "file", "path": "mine.jsonl", "name": "average"}
    tree["data"]["test"] = {**own, "split": "test"}
    with pytest.raises(
        InputError, match=r"arm 'a', seed 0: data\.test\.name 'average' is what the report calls"
    ):
        runs_of({"name": "a"}, {"name": "b", "set": {"adapter.r": 4}}, tree=tree)


def test_a_default_that_changes_with_a_setting_must_be_declared():
    """Catches: arms that differ in more than they say, because a setting changes the default of another."""
    with pytest.raises(
        InputError, match=r"arms 'a' and 'b' differ in adapter.type: 'lora' and 'none'; they may "
    ):
        runs_of({"name": "a"}, {"name": "b", "set": FULL})
    declared = [*FULL, "adapter"]
    runs = runs_of({"name": "a"}, {"name": "b", "set": FULL, "may_differ": declared})
    assert runs[1].config.adapter.type == "none"


@pytest.mark.parametrize(
    ("settings", "changes"),
    [
        ({"adapter.r": 8}, {"initial_a": "x"}),
        ({"adapter.type": "vera"}, {"initial_a": "x"}),
        ({"adapter.type": "gated_lora"}, {"initial_a": "x"}),
        ({"adapter.init": "gaussian_sqrt"}, {"initial_a": "x"}),
        ({"data.train.limit": 9}, {"data.fingerprints.train": "x", "data.train": 9, "batch_order": "x"}),
        ({"training.batch_size": 4, "training.max_steps": 80}, {"batch_order": "x", "steps": 80}),
        ({"model.path": "other/model"}, {"base.fingerprint": "x", "base.parameters": 1, "initial_a": "x"}),
        ({"model.dtype": "float32"}, {"compute_dtype": "x"}),
        ({**FULL, "adapter.type": "none", "adapter.dora": False}, {"base.parameters": 0, "initial_a": "x"}),
    ],
)
def test_a_key_that_differs_excuses_what_follows_from_it_and_nothing_else(settings, changes):
    """Catches: arms refused for what they are to differ in; a declared key that lets everything pass."""
    first = ArmRun("a", 0, run_config({}), manifest_of({}))
    other = run_config(settings)
    check_conditions([first, ArmRun("b", 0, other, manifest_of(changes))])
    for field in ("data.fingerprints.test", "processes", "seeds.training"):
        with pytest.raises(
            InputError, match=rf"arms 'a' and 'b' differ in {field}: .*'y', with .*no arms may"
        ):
            check_conditions([first, ArmRun("b", 0, other, manifest_of({**changes, field: "y"}))])
    alike = run_config({"adapter.dora": False})
    with pytest.raises(
        InputError, match=rf"differ in ({'|'.join(changes)}): .*; only arms that differ in .* may"
    ):
        check_conditions([first, ArmRun("b", 0, alike, manifest_of(changes))])


def test_other_seeds_are_not_compared_and_unknown_fields_are_left_for_later():
    """Catches: the initial A of one seed held against that of another; None taken for a fingerprint."""
    runs = [ArmRun(arm, seed, run_config({}, seed), manifest_of({}, seed)) for seed in (0, 1) for arm in "ab"]
    check_conditions(runs)
    check_conditions([*runs[:3], replace(runs[3], manifest=manifest_of({"base.fingerprint": None}, 1))])


@pytest.fixture
def started(tmp_path) -> ArmRun:
    """A run that has trained all of its 2 steps."""
    settings = {"output.dir": str(tmp_path / "a-seed0"), "training.max_steps": 2}
    run = ArmRun("a", 0, run_config(settings), manifest_of({"steps": 2}))
    directory = run.directory
    directory.start(run.config, run.manifest)
    directory.adapter.mkdir()
    (directory.adapter / "adapter_model.safetensors").write_bytes(b"x")
    step = {"loss": 1.0, "lr": 1.0, "grad_norm": 1.0, "tokens": 1, "tokens_per_second": 1.0}
    step |= {"peak_memory_bytes": 1, "seconds": 1.0}
    directory.metrics_file.write_text("".join(json.dumps({"step": n, **step}) + "\n" for n in (1, 2)))
    return run


def test_a_run_is_trained_when_nothing_is_missing(started):
    """Catches: a run cut short taken for a finished one, or a finished one trained again."""
    assert started.is_trained
    assert not replace(started, manifest=manifest_of({"steps": 3})).is_trained
    planned = replace(started, manifest=manifest_of({"steps": 2, "base.fingerprint": None, "processes": 2}))
    assert resumed(planned).manifest["base"]["fingerprint"] == "b"
    lines = started.directory.metrics_file.read_text()
    started.directory.metrics_file.write_text(lines[:-5])
    assert not started.is_trained
    started.directory.metrics_file.write_text(lines)
    (started.directory.adapter / "adapter_model.safetensors").unlink()
    assert not started.is_trained
    assert resumed(planned) == planned  # without a checkpoint it starts anew


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("settings", "changes", "message"),
    [
        ({"adapter.r": 8}, {}, "adapter.r was 16, is 8"),
        ({"training.learning_rate": 1e-3}, {}, "training.learning_rate was 0.0002, is 0.001"),
        ({"data.test.count": 9}, {}, "data.test.count was 40, is 9"),
        ({}, {"data.fingerprints.train": "x"}, "data.fingerprints.train was 'd', is 'x'"),
        ({}, {"batch_order": "x"}, "batch_order was 'o0', is 'x'"),
        ({"evaluation.limit": 3, "training.save_every": 1}, {}, None),
        ({}, {"processes": 2}, None),
    ],
)
def test_a_run_that_was_started_otherwise_is_refused_by_name(started, finished, settings, changes, message):
    """Catches: a changed arm that is reported as what it was before, or that fails after its training."""
    if not finished:
        (started.directory.adapter / "adapter_model.safetensors").unlink()
        (started.directory.checkpoints / "step-1").mkdir(parents=True)
    tree = started.config.model_dump(mode="json")
    for key, value in settings.items():
        section, _, leaf = key.rpartition(".")
        node = tree
        for part in section.split("."):
            node = node[part]
        node[leaf] = value
    now = ArmRun("a", 0, check_config(tree, RunConfig, "test"), manifest_of({"steps": 2, **changes}))
    if message is None and (finished or "processes" not in changes):
        resumed(now)
        return
    named = f"arm 'a', seed 0: .*a-seed0 was started with other .*{message or 'processes'}"
    with pytest.raises(InputError, match=named):
        resumed(now)
