"""`evaluate`: exact match of a run, a base model, or any model with any adapter."""

from __future__ import annotations

import argparse
from pathlib import Path

from tabulate import tabulate

from qdora.config_file import config_digest
from qdora.distributed.context import DistributedContext
from qdora.errors import InputError
from qdora.evaluation.evaluate import evaluate_adapter
from qdora.evaluation.scores import Scores
from qdora.run import Target, add_target_arguments, resolve_target


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_target_arguments(parser)
    parser.add_argument("--data", help="json, jsonl, csv or parquet file with questions and answers")
    parser.add_argument("--task", help="only this task of the test set")
    parser.add_argument("--limit", type=int, help="only the first so many examples")
    parser.add_argument("--base-only", action="store_true", help="the base model, without the adapter")
    parser.add_argument(
        "--output", help="folder for the reports; else the run's evaluation/, none with --data"
    )


def run(arguments: argparse.Namespace) -> None:
    """Entry of the command."""
    if arguments.limit is not None:
        arguments.set.append(f"evaluation.limit={arguments.limit}")
    without_run = arguments.model and not arguments.run
    if without_run and not arguments.data and not any(s.startswith("data.test") for s in arguments.set):
        raise InputError("without --run, name a data file with --data")
    target = resolve_target(arguments, data=arguments.data, base_only=arguments.base_only)
    context = DistributedContext.from_launch()
    context.refuse_disagreement({"the configuration": config_digest(target.config)})
    folder = _report_folder(arguments, target)
    with context.on_main_rank(target.locked):
        scores = evaluate_adapter(target.config, target.adapter, context, folder=folder, task=arguments.task)
    if context.is_main:
        print(_table(scores))
        if folder is not None:
            print(f"reports: {folder}")


def _report_folder(arguments: argparse.Namespace, target: Target) -> Path | None:
    if arguments.output:
        return Path(arguments.output)
    if target.directory is None or arguments.data:
        return None  # a run's own reports are about its own test set
    return target.directory.base_evaluation if arguments.base_only else target.directory.evaluation


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
    return tabulate(rows, headers=("task", "exact match", "std. error", "correct", "scorer"))
