"""What a comparison found: report.json, a Markdown table, a plot."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from qdora.errors import InputError
from qdora.evaluation.scores import Scores
from qdora.evaluation.statistics import paired_difference
from qdora.experiments.plots import BASE, plot_comparison
from qdora.files import write_json, write_text
from qdora.training.metrics import StepMetrics

# Facts of the manifests on which all arms of one seed must agree.
SHARED_FACTS = ("base", "data", "steps", "seeds", "initial_a", "compute_dtype", "processes")


@dataclass(frozen=True)
class ArmRun:
    """One arm trained with one seed.

    Attributes:
        arm: the arm's name.
        method: its row in the method table.
        seed: of the training.
        directory: the run directory.
        manifest: of the run.
        steps: its metrics.
        scores: by task, of its trained adapter.
    """

    arm: str
    method: str
    seed: int
    directory: Path
    manifest: dict[str, Any]
    steps: list[StepMetrics]
    scores: list[Scores]


def check_identical_conditions(runs: Sequence[ArmRun]) -> None:
    """All arms of a seed saw the same base, data, order, steps and initial A.

    Raises: InputError: they did not; the fact and the arms are named.
    """
    for seed in {run.seed for run in runs}:
        first, *others = [run for run in runs if run.seed == seed]
        for other in others:
            for fact in SHARED_FACTS:
                if first.manifest[fact] != other.manifest[fact]:
                    raise InputError(
                        f"arms {first.arm!r} and {other.arm!r} differ in {fact}: "
                        f"{first.manifest[fact]!r} and {other.manifest[fact]!r}"
                    )


def build_report(runs: Sequence[ArmRun], base_scores: Sequence[Scores]) -> dict[str, Any]:
    """All figures as plain values; the first arm is the reference of every difference.

    Args:
        runs: every arm with every seed.
        base_scores: of the base model without any adapter, by task.
    """
    check_identical_conditions(runs)
    names = list(dict.fromkeys(run.arm for run in runs))
    reference = names[0]
    tasks = [scores.task for scores in runs[0].scores]
    return {
        "reference": reference,
        "seeds": sorted({run.seed for run in runs}),
        "conditions": {fact: runs[0].manifest[fact] for fact in SHARED_FACTS},
        "versions": runs[0].manifest["versions"],
        "git_commit": runs[0].manifest["git_commit"],
        "machine": runs[0].manifest["machine"],
        "base": {s.task: {"score": s.score, "stderr": s.stderr, "total": s.total} for s in base_scores},
        "arms": {
            name: {
                **_costs([run for run in runs if run.arm == name]),
                "tasks": {task: _task(runs, name, reference, task) for task in tasks},
            }
            for name in names
        },
    }


def write_report(folder: Path, runs: Sequence[ArmRun], base_scores: Sequence[Scores]) -> dict[str, Any]:
    """Write report.json, report.md and comparison.png; the report."""
    report = build_report(runs, base_scores)
    write_json(folder / "report.json", report)
    write_text(folder / "report.md", markdown(report))
    several = len(report["seeds"]) > 1
    curves = {run.arm + (f" seed {run.seed}" if several else ""): run.steps for run in runs}
    task = next(iter(report["base"]))
    scores = {BASE: (report["base"][task]["score"], report["base"][task]["stderr"])}
    for name, arm in report["arms"].items():
        scores[name] = (arm["tasks"][task]["score"], arm["tasks"][task]["stderr"])
    plot_comparison(curves, scores, folder / "comparison.png", f"{' against '.join(report['arms'])}: {task}")
    return report


def markdown(report: dict[str, Any]) -> str:
    """The report as a page with one table a task and one of costs."""
    arms = report["arms"]
    conditions = report["conditions"]
    lines = [
        f"# {' against '.join(arms)}",
        "",
        f"Same base ({conditions['base']['parameters']:,} parameters), "
        f"{conditions['data']['train']} training examples in the same order, "
        f"{conditions['steps']} steps, same initial A, "
        f"seeds {', '.join(map(str, report['seeds']))}.",
    ]
    for task, base in report["base"].items():
        rows = [["base, no adapter", f"{100 * base['score']:.1f} ± {100 * base['stderr']:.1f}", "", ""]]
        for name, arm in arms.items():
            entry = arm["tasks"][task]
            delta = entry.get("difference")
            versus = "" if delta is None else f"{delta['points']:+.1f} ± {delta['stderr']:.1f}"
            p_value = "" if delta is None else f"{delta['p_value']:.3f}"
            rows.append([name, f"{100 * entry['score']:.1f} ± {100 * entry['stderr']:.1f}", versus, p_value])
        headers = ["arm", "exact match %", f"minus {report['reference']}, points", "p"]
        title = f"## {task}, {base['total']} questions"
        lines += ["", title, "", tabulate(rows, headers, tablefmt="github", disable_numparse=True)]
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
    ]
    headers = ["arm", "trained parameters", "final loss", "seconds/step", "tokens/s", "peak memory GiB"]
    lines += ["", "## Cost", "", tabulate(rows, headers, tablefmt="github", disable_numparse=True)]
    lines += ["", "![loss and exact match](comparison.png)", ""]
    return "\n".join(lines)


def _costs(runs: Sequence[ArmRun]) -> dict[str, Any]:
    steps = [m for run in runs for m in run.steps]
    tail = [m.loss for run in runs for m in run.steps[-max(1, len(run.steps) // 10) :]]
    return {
        "method": runs[0].method,
        "runs": [str(run.directory) for run in runs],
        "trainable_parameters": runs[0].manifest["trainable_parameters"],
        "final_loss": statistics.fmean(tail),
        "seconds_per_step": statistics.median(m.seconds for m in steps),
        "tokens_per_second": sum(m.tokens for m in steps) / sum(m.seconds for m in steps),
        "peak_memory_bytes": max(m.peak_memory_bytes for m in steps),
    }


def _task(runs: Sequence[ArmRun], name: str, reference: str, task: str) -> dict[str, Any]:
    correct_SQ = _correct(runs, name, task)
    mean, stderr = mean_and_stderr(correct_SQ)
    entry: dict[str, Any] = {
        "score": mean,
        "stderr": stderr,
        "total": len(correct_SQ[0]),
        "by_seed": [sum(correct) / len(correct) for correct in correct_SQ],
        "scorers": [
            {scorer: result.score for scorer, result in _scores(run, task).per_scorer.items()}
            for run in runs
            if run.arm == name
        ],
    }
    if name != reference:
        entry["difference"] = asdict(paired_over_seeds(correct_SQ, _correct(runs, reference, task)))
    return entry


def _correct(runs: Sequence[ArmRun], name: str, task: str) -> list[list[bool]]:
    return [[p.correct for p in _scores(run, task).predictions] for run in runs if run.arm == name]


def _scores(run: ArmRun, task: str) -> Scores:
    return next(scores for scores in run.scores if scores.task == task)


@dataclass(frozen=True)
class Difference:
    """An arm minus the reference arm, on the same questions.

    Attributes:
        points: paired_over_seeds of exact match in percentage points.
        stderr: its standard error in points, over questions.
        p_value: two-sided, of "no paired_over_seeds": exact McNemar with one seed, else from the
            normal distribution of the mean over questions.
    """

    points: float
    stderr: float
    p_value: float


def mean_and_stderr(correct_SQ: Sequence[Sequence[bool]]) -> tuple[float, float]:
    """Exact match over seeds and questions, and its standard error over questions.

    Questions are the sample: the answers of several seeds to one question are not independent,
    so they are averaged before the spread is taken.

    Args:
        correct_SQ: S seeds, Q questions.
    """
    per_question = _over_seeds(correct_SQ)
    mean = sum(per_question) / len(per_question)
    return mean, _stderr(per_question, mean)


def paired_over_seeds(arm_SQ: Sequence[Sequence[bool]], reference_SQ: Sequence[Sequence[bool]]) -> Difference:
    """Compare two arms on the same questions and seeds.

    Raises: ValueError: they do not answer the same questions.
    """
    if len(arm_SQ) == 1:
        paired = paired_difference(arm_SQ[0], reference_SQ[0])
        return Difference(100 * paired.difference, 100 * paired.stderr, paired.p_value)
    deltas = [a - b for a, b in zip(_over_seeds(arm_SQ), _over_seeds(reference_SQ), strict=True)]
    mean = sum(deltas) / len(deltas)
    stderr = _stderr(deltas, mean)
    p_value = math.erfc(abs(mean) / stderr / math.sqrt(2)) if stderr else float(mean == 0)
    return Difference(100 * mean, 100 * stderr, p_value)


def _over_seeds(correct_SQ: Sequence[Sequence[bool]]) -> list[float]:
    return [sum(answers) / len(answers) for answers in zip(*correct_SQ, strict=True)]


def _stderr(values: Sequence[float], mean: float) -> float:
    return math.sqrt(sum((v - mean) ** 2 for v in values)) / len(values)
