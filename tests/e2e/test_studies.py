"""The shipped studies on the 135M model, planned for a tiny one: every arm is checked, none is trained."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qdora.commands.train import plan_run, read_inputs
from qdora.config_file import load_config, read_yaml, set_key
from qdora.distributed.context import DistributedContext
from qdora.experiments.arms import CompareConfig, check_conditions, expand

from .runs import ROOT

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize("name", ["main-135m", "variants-135m", "gates-135m"])
def test_every_arm_of_a_shipped_study_passes_the_checks(tiny_model_folder, name):
    """Catches: an arm that its architecture cannot take, or that is refused for what it is there to show."""
    path = ROOT / "configs" / "compare" / f"{name}.yaml"
    comparison = load_config(path, [], CompareConfig)
    tree = read_yaml(path.parent / comparison.base)
    for key, value in {"model.path": str(tiny_model_folder), "data.max_length": 512}.items():
        set_key(tree, key, value)
    first_points = {run.arm: run for run in reversed(expand(tree, comparison)) if run.train}
    runs = list(reversed(first_points.values()))
    context = DistributedContext()
    _, _, data = read_inputs(runs[0].config)
    planned = [replace(run, manifest=plan_run(run.config, data, context)[1]) for run in runs]
    check_conditions(planned)
    assert len({run.manifest["base"]["parameters"] for run in planned}) == (
        2 if any(run.config.training.mode == "full" for run in planned) else 1
    )
    initial = {run.arm: run.manifest["initial_a"] for run in planned}
    same = {"qdora", "qdora-frozen-magnitude", "qdora-exact-gradient", "lora", "dora"} & initial.keys()
    assert {initial[arm] for arm in same} == {initial["qlora"]}
    trained = {run.arm: run.manifest["trainable_parameters"] for run in planned}
    assert trained.get("qdora-frozen-magnitude", trained["qlora"]) == trained["qlora"] < trained["qdora"]
