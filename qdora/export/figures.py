"""The figures of a model card: scores of a run, by our reports and by lm-evaluation-harness'."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from huggingface_hub import EvalResult

from qdora.adapters.saved import WEIGHTS_FILE
from qdora.config import DatasetConfig, RunConfig
from qdora.errors import InputError
from qdora.evaluation.harness import FOLDER, HarnessScores, read_harness_scores
from qdora.evaluation.scores import Scores, read_scores
from qdora.tasks import find_task

T = TypeVar("T")


@dataclass(frozen=True)
class Result:
    """One figure of a card."""

    task: str
    metric: str
    shown: str
    fraction: float
    limits: tuple[float, float] | None
    total: int
    base: str
    dataset: str
    config: str | None
    split: str | None

    @property
    def value(self) -> str:
        return _number(self.fraction, self.metric)

    @property
    def interval(self) -> str:
        low, high = self.limits or (None, None)
        return (
            "" if low is None or high is None else " to ".join(_number(x, self.metric) for x in (low, high))
        )


def read_results(
    config: RunConfig, reports: Path, base_reports: Path, adapter: Path
) -> tuple[list[Result], list[str]]:
    """The figures in a run's reports, and sentences on those that are older than the adapter."""
    made = (adapter / WEIGHTS_FILE).stat().st_mtime
    results: list[Result] = []
    left_out: list[str] = []
    base = {scores.task: scores for _, scores in _read_all(base_reports, read_scores, [])}
    for path, scores in _read_all(reports, read_scores, left_out):
        if _is_newer(path, made, left_out):
            results.append(_own(scores, base.get(scores.task), config))
    below, base_below = reports / FOLDER, base_reports / FOLDER
    base_of = {scores.task: scores for _, scores in _read_all(base_below, read_harness_scores, [])}
    for path, found in _read_all(below, read_harness_scores, left_out):
        if _is_newer(path, made, left_out):
            results += _of_harness(found, base_of.get(found.task))
    return results, left_out


def _read_all(folder: Path, read: Callable[[Path], T], left_out: list[str]) -> Iterator[tuple[Path, T]]:
    """What is read from a folder's reports; a sentence on each file that is none."""
    for path in sorted(folder.glob("*.json")):
        try:
            yield path, read(path)
        except InputError:
            left_out.append(f"The report {path.name} cannot be read, and is left out.")


def _is_newer(path: Path, made: float, left_out: list[str]) -> bool:
    if path.stat().st_mtime >= made:
        return True
    left_out.append(f"The scores in {path.name} are older than the adapter, and left out.")
    return False


def _own(scores: Scores, other: Scores | None, config: RunConfig) -> Result:
    test = config.data.test
    dataset = None if test is None else dataset_id(test)
    comparable = other is not None and other.total == scores.total and other.scorer == scores.scorer
    return Result(
        task=scores.task,
        metric=scores.metric,
        shown=f"{scores.metric.replace('_', ' ')} (`{scores.scorer}`)",
        fraction=scores.score,
        limits=scores.interval,
        total=scores.total,
        base=_number(other.score, scores.metric) if other is not None and comparable else "",
        dataset=dataset or scores.task,
        config=None,
        split=None if test is None else test.split,
    )


def _of_harness(scores: HarnessScores, base: HarnessScores | None) -> list[Result]:
    others = (
        {(m.metric, m.filter): m.value for m in base.metrics} if base and base.total == scores.total else {}
    )
    results = []
    for metric in scores.metrics:
        other = others.get((metric.metric, metric.filter))
        filtered = "" if metric.filter == "none" else f", {metric.filter}"
        results.append(
            Result(
                task=scores.task,
                metric=metric.metric,
                shown=f"{metric.metric}{filtered} ({scores.decoding['method']}, {scores.shots or 0} shots)",
                fraction=metric.value,
                limits=metric.interval,
                total=scores.total,
                base="" if other is None else _number(other, metric.metric),
                dataset=scores.dataset if scores.dataset and "/" in scores.dataset else scores.task,
                config=scores.dataset_config,
                split=scores.split,
            )
        )
    return results


def eval_result(result: Result) -> EvalResult:
    interval = f", 95% interval {result.interval}" if result.interval else ""
    return EvalResult(
        task_type="text-generation",
        task_name="Text generation",
        dataset_type=result.dataset,
        dataset_name=result.task,
        dataset_config=result.config,
        dataset_split=result.split,
        metric_type=result.metric,
        metric_value=round(result.fraction, 6),
        metric_name=f"{result.shown.replace('`', '')}{interval}, {result.total} questions",
    )


def _number(value: float, metric: str) -> str:
    fraction = metric in ("exact_match", "accuracy") or metric.startswith(("acc", "exact"))
    return f"{100 * value:.1f}%" if fraction else f"{value:.4g}"


def dataset_id(config: DatasetConfig) -> str | None:
    """Id of a data set on the hub."""
    if config.source == "hub":
        return None if Path(str(config.path)).is_dir() else config.path
    return find_task(config).dataset or None
