"""What a comparison found: report.json, a Markdown page, a plot."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from qdora.adapters.base import describe
from qdora.config_file import dotted
from qdora.evaluation.scores import Scores, paired_difference
from qdora.experiments.arms import CONDITIONS, ArmRun, check_conditions, differences
from qdora.experiments.grid import GridPoint
from qdora.files import write_json, write_text

_SHOWN = {
    "base.fingerprint": "base",
    "base.parameters": "{:,} frozen parameters",
    "data.train": "{:,} training examples",
    "batch_order": "order of the batches",
    "steps": "{:,} steps",
    "initial_a": "initial A",
}
"""Conditions that the page names where all arms agree on them."""


def build_report(
    runs: Sequence[ArmRun], bases: Mapping[str, Sequence[Scores]], grid: Sequence[GridPoint] = ()
) -> dict[str, Any]:
    """All figures as plain values; the first arm is the reference of every difference.

    Args:
        runs: every arm with every seed; an arm without training once.
        bases: scores of the base models without adapters, by task, and a name for each.
        grid: all points of the arms' grids.
    Raises: InputError: as `check_conditions`.
    """
    check_conditions(runs)
    arms: dict[str, list[ArmRun]] = {}
    for run in runs:
        arms.setdefault(run.arm, []).append(run)
    reference = runs[0]
    trained = [of_arm[0] for of_arm in arms.values() if of_arm[0].train]
    manifests = [dotted(run.manifest) for run in trained or [reference]]
    settings = differences([of_arm[0].config for of_arm in arms.values()])
    return {
        "reference": reference.arm,
        "seeds": sorted({run.seed for run in runs}),
        "conditions": {
            field: value
            for field, value in manifests[0].items()
            if field in CONDITIONS and all(other.get(field) == value for other in manifests)
        },
        "differences": {key: dict(zip(arms, values, strict=True)) for key, values in settings.items()},
        **{key: reference.manifest[key] for key in ("versions", "git_commit", "machine")},
        "grid": [asdict(point) for point in grid],
        "bases": {
            name: {s.task: {"score": s.score, "stderr": s.stderr, "total": s.total} for s in scores}
            for name, scores in bases.items()
        },
        "arms": {
            name: {
                **_costs(of_arm),
                "tasks": {s.task: _task(of_arm, arms[reference.arm], s.task) for s in reference.scores},
            }
            for name, of_arm in arms.items()
        },
    }


def write_report(
    folder: Path,
    runs: Sequence[ArmRun],
    bases: Mapping[str, Sequence[Scores]],
    grid: Sequence[GridPoint] = (),
) -> dict[str, Any]:
    """Write report.json, report.md and comparison.png; the report."""
    report = build_report(runs, bases, grid)
    write_json(folder / "report.json", report)
    write_text(folder / "report.md", markdown(report))
    several = len(report["seeds"]) > 1
    curves = {run.arm + (f" seed {run.seed}" if several else ""): run.steps for run in runs}
    task = runs[0].scores[0].task
    of_arms = {name: arm["tasks"][task] for name, arm in report["arms"].items()}
    of_bases = {name: tasks[task] for name, tasks in report["bases"].items()}
    from qdora.experiments.plots import plot_comparison  # with matplotlib

    title = f"{' against '.join(report['arms'])}: {task}"
    plot_comparison(curves, of_bases, of_arms, folder / "comparison.png", title)
    return report


def markdown(report: dict[str, Any]) -> str:
    """The report as a page: what the arms differ in, a table for each task, and one of costs."""
    arms = report["arms"]
    same = [text.format(report["conditions"][k]) for k, text in _SHOWN.items() if k in report["conditions"]]
    lines = [
        f"# {' against '.join(arms)}",
        "",
        f"The same in all arms: {', '.join(same)}. Seeds: {', '.join(map(str, report['seeds']))}.",
        "",
    ]
    rows = [["trained", *(arm["trained"] for arm in arms.values())]]
    for key, values in report["differences"].items():
        rows.append([key, *(v if isinstance(v, str) else json.dumps(v) for v in values.values())])
    lines.append(_table(rows, ["", *arms]))
    for task, reference in arms[report["reference"]]["tasks"].items():
        rows = [[f"{name}, no adapter", _percent(of[task]), "", ""] for name, of in report["bases"].items()]
        for name, arm in arms.items():
            entry = arm["tasks"][task]
            delta = entry.get("difference")
            versus = "" if delta is None else f"{delta['points']:+.1f} ± {delta['stderr']:.1f}"
            rows.append([name, _percent(entry), versus, "" if delta is None else f"{delta['p_value']:.3f}"])
        headers = ["arm", "exact match %", f"minus {report['reference']}, points", "p"]
        lines += ["", f"## {task}, {reference['total']} questions", "", _table(rows, headers)]
    rows = [
        [
            name,
            f"{arm['trainable_parameters']:,}",
            f"{arm['final_loss']:.4f}",
            f"{arm['seconds_per_step']:.2f}",
            f"{arm['tokens_per_second']:,.0f}",
            f"{arm['peak_memory_bytes'] / 2**30:.2f}",
        ]
        for name, arm in arms.items()
        if "final_loss" in arm
    ]
    headers = ["arm", "trained parameters", "final loss", "seconds/step", "tokens/s", "peak memory GiB"]
    lines += ["", "## Cost", "", _table(rows, headers), "", "![loss and exact match](comparison.png)", ""]
    return "\n".join(lines)


def _percent(entry: Mapping[str, float]) -> str:
    return f"{100 * entry['score']:.1f} ± {100 * entry['stderr']:.1f}"


def _table(rows: Sequence[Sequence[str]], headers: Sequence[str]) -> str:
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def _costs(of_arm: Sequence[ArmRun]) -> dict[str, Any]:
    if not of_arm[0].train:
        quantization = of_arm[0].config.model.quantization
        return {"trained": f"{quantization}, not trained", "runs": [of_arm[0].config.output.dir]}
    steps = [m for run in of_arm for m in run.steps]
    tail = [m.loss for run in of_arm for m in run.steps[-max(1, len(run.steps) // 10) :]]
    config = of_arm[0].config
    return {
        "trained": describe(config.model.quantization, config.adapter, config.training.mode),
        "runs": [run.config.output.dir for run in of_arm],
        "trainable_parameters": of_arm[0].manifest["trainable_parameters"],
        "final_loss": statistics.fmean(tail),
        "seconds_per_step": statistics.median(m.seconds for m in steps),
        "tokens_per_second": sum(m.tokens for m in steps) / sum(m.seconds for m in steps),
        "peak_memory_bytes": max(m.peak_memory_bytes for m in steps),
    }


def _task(of_arm: Sequence[ArmRun], of_reference: Sequence[ArmRun], task: str) -> dict[str, Any]:
    of_seeds = [_scores(run, task) for run in of_arm]
    correct_SQ = [_correct(scores) for scores in of_seeds]
    mean, stderr = mean_and_stderr(correct_SQ)
    entry: dict[str, Any] = {
        "score": mean,
        "stderr": stderr,
        "total": of_seeds[0].total,
        "by_seed": [scores.score for scores in of_seeds],
        "scorers": [{name: r.score for name, r in scores.per_scorer.items()} for scores in of_seeds],
    }
    if of_arm is not of_reference:
        reference_SQ = [_correct(_scores(run, task)) for run in of_reference]
        # A base model gives every seed the same answers.
        if not of_arm[0].train:
            correct_SQ = correct_SQ * len(reference_SQ)
        elif not of_reference[0].train:
            reference_SQ = reference_SQ * len(correct_SQ)
        entry["difference"] = asdict(paired_over_seeds(correct_SQ, reference_SQ))
    return entry


def _scores(run: ArmRun, task: str) -> Scores:
    return next(scores for scores in run.scores if scores.task == task)


def _correct(scores: Scores) -> list[bool]:
    return [prediction.correct for prediction in scores.predictions]


@dataclass(frozen=True)
class Difference:
    """An arm minus the reference arm, on the same questions.

    Attributes:
        points: difference of exact match in percentage points.
        stderr: its standard error in points, over questions.
        p_value: two-sided, of "no difference": exact McNemar with one seed, else from the normal distribution
            of the mean over questions.
    """

    points: float
    stderr: float
    p_value: float


def mean_and_stderr(correct_SQ: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Exact match over seeds and questions, and its standard error over questions.

    Questions are the sample: the answers of several seeds to one question are not independent,
    so they are averaged before the spread is taken.

    Args:
        correct_SQ: S seeds, Q questions.
    """
    score_Q = np.mean(correct_SQ, axis=0)
    return float(score_Q.mean()), float(score_Q.std() / math.sqrt(len(score_Q)))


def paired_over_seeds(arm_SQ: Sequence[Sequence[bool]], reference_SQ: Sequence[Sequence[bool]]) -> Difference:
    """Compare two arms on the same questions and seeds.

    Raises: ValueError: they do not answer the same questions.
    """
    if len(arm_SQ) == 1:
        paired = paired_difference(arm_SQ[0], reference_SQ[0])
        return Difference(100 * paired.difference, 100 * paired.stderr, paired.p_value)
    if np.shape(arm_SQ) != np.shape(reference_SQ):
        raise ValueError(f"answers of shape {np.shape(arm_SQ)} compared with {np.shape(reference_SQ)}")
    mean, stderr = mean_and_stderr(np.subtract(arm_SQ, reference_SQ, dtype=float).tolist())
    p_value = math.erfc(abs(mean) / stderr / math.sqrt(2)) if stderr else float(mean == 0)
    return Difference(100 * mean, 100 * stderr, p_value)
