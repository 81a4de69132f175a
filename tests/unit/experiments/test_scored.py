"""When a comparison scores again what it has scored."""

from __future__ import annotations

from qdora.commands.compare import _inputs
from qdora.experiments.arms import ArmRun

from .runs import manifest_of, run_config


def inputs(settings: dict[str, object], train: str = "d") -> object:
    manifest = manifest_of({"data.fingerprints.train": train})
    return _inputs(ArmRun("a", 0, run_config(settings), manifest), None)


def test_shots_make_scores_depend_on_the_training_data() -> None:
    """Catches: scores kept although their shots come from other data; all bases scored again for each
    training set where there are no shots."""
    limit = {"data.train.limit": 9}
    assert inputs({}) == inputs(limit, "e")
    shots = {"evaluation.shots": 2}
    assert inputs(shots) == inputs(shots)
    assert inputs(shots) != inputs({})
    assert inputs(shots) != inputs(shots, "e")
    assert inputs(shots) != inputs({**shots, "evaluation.shots_seed": 1})


def test_the_method_counts() -> None:
    """Catches: generated answers shown as ranked ones."""
    choice = {"data.test": {"source": "boolq", "path": "x", "split": "test"}}
    methods = [inputs({**choice, "evaluation.method": method}) for method in ("generate", "rank", "both")]
    assert all(one != other for i, one in enumerate(methods) for other in methods[:i])
