"""`evaluate`: exact match of a run, a base model, or any model with any adapter."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

from qdora.config_file import config_digest
from qdora.distributed.context import DistributedContext
from qdora.evaluation.evaluate import evaluate_adapter
from qdora.evaluation.harness import FOLDER, HarnessScores, evaluate_harness
from qdora.evaluation.scores import Scores
from qdora.export.card import renew_run_cards
from qdora.run import Target


def evaluate(arguments: argparse.Namespace, target: Target) -> None:
    """Score, print the table, and write the reports where they have a place.

    Args:
        arguments: of the command.
        target: what they name.
    """
    context = DistributedContext.from_launch()
    context.refuse_disagreement({"the configuration": config_digest(target.config)})
    folder = _report_folder(arguments, target)
    with context.on_main_rank(target.locked):
        scores = evaluate_adapter(
            target.config, target.adapter, context, folder=folder, task=arguments.task, split=arguments.split
        )
    if context.is_main:
        print(_table(scores))
        if folder is not None:
            print(f"reports: {folder}")
            _write_card(target, folder)
        elif target.directory is not None and not arguments.data:
            print("reports: none, the adapter is not the run's own; --output DIR writes them")


def evaluate_with_harness(arguments: argparse.Namespace, target: Target, tasks: Sequence[str]) -> None:
    """The same with tasks of lm-evaluation-harness.

    Args:
        arguments: of the command.
        target: what they name.
        tasks: names.
    """
    context = DistributedContext.from_launch()
    context.refuse_disagreement({"the configuration": config_digest(target.config)})
    folder = _report_folder(arguments, target)
    own = None if arguments.lm_eval_tasks is None else Path(arguments.lm_eval_tasks)
    with context.on_main_rank(target.locked):
        scores = evaluate_harness(
            target.config, target.adapter, context, tasks, tasks_folder=own, folder=folder
        )
    if context.is_main:
        print(_harness_table(scores))
        if folder is not None:
            print(f"reports: {folder / FOLDER}")
            _write_card(target, folder)


def _write_card(target: Target, folder: Path) -> None:
    """The run's own reports are in the card beside its adapter."""
    run = target.directory
    if run is None or folder not in (run.evaluation, run.base_evaluation, run.best_evaluation):
        return
    print(*(f"{sentence}\n" for sentence in renew_run_cards(run)), sep="", end="")


def _report_folder(arguments: argparse.Namespace, target: Target) -> Path | None:
    if arguments.output:
        return Path(arguments.output)
    if target.directory is None or arguments.data:
        return None  # a run's own reports are about its own test set
    directory, on_validation = target.directory, arguments.split == "validation"
    if arguments.base_only:
        return directory.base_validation if on_validation else directory.base_evaluation
    adapter = target.adapter and target.adapter.resolve()
    if adapter == directory.best_adapter.resolve():
        return directory.best_validation if on_validation else directory.best_evaluation
    if adapter == directory.adapter.resolve():
        return directory.validation if on_validation else directory.evaluation
    return None  # scores of another adapter are not the run's


def _table(scores: list[Scores]) -> str:
    rows = [
        (
            score.task,
            f"{100 * score.score:.1f}%",
            f"± {100 * score.stderr:.1f}",
            f"{score.correct}/{score.total}",
            score.scorer,
        )
        for score in scores
    ]
    metric = ", ".join(sorted({score.metric.replace("_", " ") for score in scores}))
    return tabulate(rows, headers=("task", metric, "std. error", "correct", "scorer"))


def _harness_table(scores: Sequence[HarnessScores]) -> str:
    rows = [
        (
            score.task if number == 0 else "",
            metric.metric if metric.filter == "none" else f"{metric.metric} ({metric.filter})",
            f"{metric.value:.4f}",
            "" if metric.stderr is None else f"± {metric.stderr:.4f}",
            "" if metric.interval is None else "{:.4f} to {:.4f}".format(*metric.interval),
            score.total,
            "" if score.shots is None else score.shots,
        )
        for score in scores
        for number, metric in enumerate(score.metrics)
    ]
    headers = ("task", "metric", "value", "std. error", "95% interval", "documents", "shots")
    return tabulate(rows, headers=headers, disable_numparse=True)
