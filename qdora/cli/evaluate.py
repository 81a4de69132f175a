"""Options of `evaluate`."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from qdora.errors import InputError, require
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
        "--lm-eval",
        metavar="TASKS",
        help="score tasks of lm-evaluation-harness instead, where it is installed: names, groups or "
        "patterns, separated by commas",
    )
    parser.add_argument(
        "--lm-eval-tasks", metavar="DIR", help="folder with further tasks of the harness, as YAML files"
    )
    parser.add_argument(
        "--output", help="folder for the reports; else the run's evaluation/, none with --data"
    )


def prepare(arguments: argparse.Namespace) -> Callable[[], None]:
    """Find what is evaluated; what is left to do."""
    if arguments.lm_eval is not None or arguments.lm_eval_tasks is not None:
        return _prepare_harness(arguments)
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
    elif target.config.data.test is None:
        other = ", or score what data.validation left out, with --split validation"
        raise InputError(
            "there is no test set: data.test is not set. Name a file with --data, or set one as "
            "--set data.test='{source: file, path: FILE}'"
            f"{other if target.config.data.validation else ''}"
        )

    def work() -> None:
        from qdora.commands.evaluate import evaluate

        evaluate(arguments, target)

    return work


def _prepare_harness(arguments: argparse.Namespace) -> Callable[[], None]:
    """The same for tasks of lm-evaluation-harness."""
    if arguments.lm_eval is None:
        raise InputError("--lm-eval-tasks is a folder of tasks; name those to score with --lm-eval")
    tasks = [name.strip() for name in arguments.lm_eval.split(",") if name.strip()]
    if not tasks:
        raise InputError(f"--lm-eval {arguments.lm_eval!r} names no task; allowed: names with commas between")
    others = {"--data": arguments.data, "--task": arguments.task}
    others |= {"--split validation": arguments.split == "validation"}
    for option in (name for name, given in others.items() if given):
        raise InputError(f"--lm-eval scores the harness' own tasks; {option} does not go with it")
    require("lm_eval", "--lm-eval")
    # A run's limit is one of its own test examples.
    arguments.set.append(f"evaluation.limit={'null' if arguments.limit is None else arguments.limit}")
    target = resolve_target(arguments, data=None, base_only=arguments.base_only, best=arguments.best)

    def work() -> None:
        from qdora.commands.evaluate import evaluate_with_harness

        evaluate_with_harness(arguments, target, tasks)

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
