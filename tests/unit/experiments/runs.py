"""Configurations, manifests and scores of runs that were never trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

from qdora.config import RunConfig
from qdora.config_file import check_config, set_key
from qdora.evaluation.scores import Prediction, Scores, summarize
from qdora.experiments.arms import ArmRun
from qdora.tasks.base import Task
from qdora.tasks.scoring import Verdict
from qdora.training.metrics import StepMetrics


def run_tree() -> dict[str, Any]:
    data = {"source": "synthetic", "count": 40}
    return {
        "model": {"path": "some/model"},
        "data": {"train": data, "test": {**data, "split": "test"}},
        "training": {"max_steps": 20},
        "output": {"dir": "runs/a"},
    }


def run_config(settings: dict[str, Any], seed: int = 0) -> RunConfig:
    tree = run_tree()
    for key, value in {**settings, "training.seed": seed}.items():
        set_key(tree, key, value)
    return check_config(tree, RunConfig, "test")


def manifest_of(changes: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """The manifest of a run, with some dotted fields changed."""
    manifest = {
        "base": {"fingerprint": "b", "parameters": 1234567},
        "data": {
            "fingerprints": {"train": "d", "test": "t", "validation": "v"},
            "train": 40,
            "test": 8,
            "validation": 4,
            "leaked_questions_removed": 2,
            "leaked_validation_questions_removed": 1,
        },
        "batch_order": f"o{seed}",
        "steps": 20,
        "seeds": {"training": seed, "data": 42},
        "initial_a": f"a{seed}",
        "compute_dtype": "torch.float32",
        "processes": 1,
        "versions": {"torch": "2"},
        "git_commit": None,
        "machine": {},
        "trainable_parameters": 4321,
    }
    for key, value in changes.items():
        set_key(manifest, key, value)
    return manifest


class Scored(NamedTuple):
    """What `summarize` needs to know of a task."""

    name: str
    scorers: tuple[str, ...]


def scores_of(answers: Mapping[str, str], task: str = "gsm8k") -> Scores:
    """Scores of a task whose answers are right (T) or not (F), by scorer, the headline scorer first."""
    predictions = []
    for number, of_question in enumerate(zip(*answers.values(), strict=True)):
        verdicts = {
            name: Verdict("7" if right == "T" else f"{number}", "7", right == "T")
            for name, right in zip(answers, of_question, strict=True)
        }
        first = next(iter(verdicts.values()))
        origin = f"some/data/{task}.json:{number}"
        predictions.append(
            Prediction(origin, "the question", "the output", *vars(first).values(), 3, True, verdicts)
        )
    return summarize(cast(Task, Scored(task, tuple(answers))), predictions, {}, 2.0)


def numeric(answers: str, task: str = "gsm8k") -> Scores:
    """Scores whose two scorers agree."""
    return scores_of({"normalized": answers, "published": answers}, task)


def arm_of(
    name: str,
    scores: Sequence[Scores],
    seed: int = 0,
    *,
    loss: float = 1.0,
    settings: Mapping[str, Any] | None = None,
    trained: bool = True,
    **changes: Any,
) -> ArmRun:
    """An arm of 20 steps with the settings, whose manifest has some other fields."""
    config = run_config(dict(settings or {}), seed)
    steps = [StepMetrics(n, loss + 20 - n, 1e-4, 1.0, 100 * n, 1.0, 1 << 30, 0.5) for n in range(1, 21)]
    manifest = manifest_of(changes, seed)
    if not trained:
        for field in ("batch_order", "steps", "initial_a", "trainable_parameters"):
            del manifest[field]
        del manifest["base"]["parameters"]
    return ArmRun(name, seed, config, manifest, steps if trained else (), scores, train=trained)
