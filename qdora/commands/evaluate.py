"""`evaluate`: exact match of a run, a base model, or any model with any adapter."""

from __future__ import annotations

import argparse
from pathlib import Path

from tabulate import tabulate

from qdora.adapters.peft_format import load_adapter
from qdora.commands.base import load_configured
from qdora.commands.score import score_model
from qdora.commands.target import Target, add_target_arguments, resolve_target
from qdora.data.example import Example
from qdora.data.prepare import load_test
from qdora.data.tokenize import choose_pad_token
from qdora.errors import InputError, suggest
from qdora.evaluation.evaluate import Scores
from qdora.evaluation.report import write_scores
from qdora.parallel.processes import Processes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_target_arguments(parser)
    parser.add_argument("--data", help="json, jsonl, csv or parquet file with questions and answers")
    parser.add_argument("--task", help="only this task of the test set")
    parser.add_argument("--limit", type=int, help="only the first so many examples")
    parser.add_argument("--base-only", action="store_true", help="the base model, without the adapter")
    parser.add_argument("--output", help="folder for the reports; the run's evaluation/ where not given")


def run(arguments: argparse.Namespace) -> None:
    """Entry of the command."""
    if arguments.limit is not None:
        arguments.set.append(f"evaluation.limit={arguments.limit}")
    if not arguments.run and not arguments.data and not any(s.startswith("data.test") for s in arguments.set):
        raise InputError("without --run, name a data file with --data")
    target = resolve_target(arguments, data=arguments.data, base_only=arguments.base_only)
    processes = Processes.start()
    settings = target.config.model
    model, tokenizer = load_configured(settings, device=processes.device, progress=processes.is_main)
    choose_pad_token(tokenizer)
    examples = _of_task(load_test(target.config.data, tokenizer).examples, arguments.task)
    if target.adapter is not None:
        load_adapter(model, target.adapter)
    scores = score_model(model, tokenizer, examples, target.config, processes)
    if processes.is_main:
        folder = _report_folder(arguments, target)
        if folder is not None:
            for score in scores:
                write_scores(score, folder)
        print(_table(scores))
        if folder is not None:
            print(f"reports: {folder}")
    processes.wait()


def _of_task(examples: list[Example], task: str | None) -> list[Example]:
    if task is None:
        return examples
    chosen = [e for e in examples if e.task == task]
    if not chosen:
        raise InputError(
            f"--task {task!r}: the test set has none; {suggest(task, {e.task for e in examples})}"
        )
    return chosen


def _report_folder(arguments: argparse.Namespace, target: Target) -> Path | None:
    if arguments.output:
        return Path(arguments.output)
    if target.directory is None:
        return None
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
    return tabulate(
        rows, headers=("task", "exact match", "std. error", "correct", "scorer"), tablefmt="simple"
    )
