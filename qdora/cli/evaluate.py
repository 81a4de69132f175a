"""Options of `evaluate`."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from qdora.errors import InputError
from qdora.run import Target, add_best_argument, add_target_arguments, resolve_target
from qdora.tasks import check_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_target_arguments(parser)
    add_best_argument(parser)
    parser.add_argument("--data", help="json, jsonl, csv or parquet file with questions and answers")
    parser.add_argument("--task", help="only this task of the set")
    parser.add_argument(
        "--split",
        choices=("test", "validation"),
        default="test",
        help="score the test set, or the examples that data.validation left out of training",
    )
    parser.add_argument("--limit", type=int, help="only the first so many examples")
    parser.add_argument("--base-only", action="store_true", help="the base model, without the adapter")
    parser.add_argument(
        "--output", help="folder for the reports; else the run's evaluation/, none with --data"
    )


def prepare(arguments: argparse.Namespace) -> Callable[[], None]:
    """Find what is evaluated; what is left to do."""
    if arguments.limit is not None:
        arguments.set.append(f"evaluation.limit={arguments.limit}")
    elif arguments.split == "validation":
        arguments.set.append("evaluation.limit=null")  # a run's limit is one of test examples
    without_run = arguments.model and not arguments.run
    if without_run and not arguments.data and not any(s.startswith("data.test") for s in arguments.set):
        raise InputError("without --run, name a data file with --data")
    if arguments.split == "validation" and arguments.data:
        raise InputError("--data names a test set; with --split validation leave it out")
    target = resolve_target(
        arguments, data=arguments.data, base_only=arguments.base_only, best=arguments.best
    )
    check_run(target.config)
    if arguments.split == "validation":
        _check_validation(target)

    def work() -> None:
        from qdora.commands.evaluate import evaluate

        evaluate(arguments, target)

    return work


def _check_validation(target: Target) -> None:
    """Refuse to call examples left out that the run may have been trained on.

    Raises: InputError: there is no validation set, or it would not be the run's own.
    """
    config = target.config.data
    if config.validation is None:
        raise InputError(
            "--split validation: data.validation is null, so no examples were left out of training; allowed: "
            "test"
        )
    if target.directory is None:
        return
    own = target.directory.config().data
    for key in ("train", "test", "validation"):
        if getattr(config, key) != getattr(own, key):
            raise InputError(
                f"--split validation: --set changes data.{key}, from which it follows what "
                f"{target.directory.path} left out of training; leave it as it is in the run"
            )
