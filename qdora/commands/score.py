"""Score a model as a run's configuration says: what training and the evaluate command share."""

from __future__ import annotations

import sys
from pathlib import Path

from qdora.commands.base import load_with_adapter
from qdora.config import RunConfig
from qdora.data.rows import Example
from qdora.data.tokenize import choose_pad_token
from qdora.distributed.context import DistributedContext
from qdora.errors import InputError, suggest
from qdora.evaluation.evaluate import evaluate_configured
from qdora.evaluation.scores import Scores, write_scores
from qdora.tasks import check_data
from qdora.tasks.prepare import load_test


def score_adapter(
    config: RunConfig,
    adapter: Path | None,
    context: DistributedContext,
    *,
    folder: Path | None = None,
    task: str | None = None,
) -> list[Scores]:
    """Load the base, put the adapter on it, score the test set, write the reports.

    Args:
        adapter: folder in PEFT's format; None scores the base alone.
        folder: where reports go; None writes none.
        task: only this task of the test set.
    Raises: InputError: anything that cannot be loaded, or no example of the task.
    """
    check_data(config.data)
    model, tokenizer = load_with_adapter(config.model, adapter, context)
    choose_pad_token(tokenizer)
    with context.raise_on_all_ranks():
        test = load_test(config.data, tokenizer)
    if test.skipped and context.is_main:
        first = test.skipped[0]
        print(
            f"{len(test.skipped)} test rows left out, the first: {first.origin}: {first.reason}",
            file=sys.stderr,
        )
    examples = _of_task(test.examples, task)
    scores = evaluate_configured(model, tokenizer, examples, config, context)
    if context.is_main and folder is not None:
        for score in scores:
            write_scores(score, folder)
    context.barrier()
    return scores


def _of_task(examples: list[Example], task: str | None) -> list[Example]:
    if task is None:
        return examples
    chosen = [e for e in examples if e.task == task]
    if not chosen:
        raise InputError(
            f"--task {task!r}: the test set has none; {suggest(task, {e.task for e in examples})}"
        )
    return chosen
