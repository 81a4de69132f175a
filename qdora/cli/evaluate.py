"""Options of `evaluate`."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from qdora.errors import InputError
from qdora.run import add_target_arguments, resolve_target
from qdora.tasks import check_run


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


def prepare(arguments: argparse.Namespace) -> Callable[[], None]:
    """Find what is evaluated; what is left to do."""
    if arguments.limit is not None:
        arguments.set.append(f"evaluation.limit={arguments.limit}")
    without_run = arguments.model and not arguments.run
    if without_run and not arguments.data and not any(s.startswith("data.test") for s in arguments.set):
        raise InputError("without --run, name a data file with --data")
    target = resolve_target(arguments, data=arguments.data, base_only=arguments.base_only)
    check_run(target.config)

    def work() -> None:
        from qdora.commands.evaluate import evaluate

        evaluate(arguments, target)

    return work
