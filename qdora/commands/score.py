"""Score a model as a run's configuration says: what training and the evaluate command share."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qdora.config import RunConfig
from qdora.data.rows import Example
from qdora.data.tokenize import choose_pad_token
from qdora.distributed.context import DistributedContext
from qdora.distributed.generation import for_generation
from qdora.errors import InputError, suggest
from qdora.evaluation.evaluate import Scores, evaluate
from qdora.evaluation.scores import write_scores
from qdora.models.hub import open_checkpoint
from qdora.models.load import load_with_adapter, required_tokenizer
from qdora.quant import Quantization
from qdora.tasks.prepare import load_test


def score_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    config: RunConfig,
    context: DistributedContext,
    *,
    show_progress: bool = True,
) -> list[Scores]:
    """Exact match on test examples, split over the processes; one entry a task.

    Raises: InputError: prompt and answer do not fit into the model's context.
    """
    settings = config.evaluation
    tokens = settings.batch_size * (config.data.max_length + settings.max_new_tokens)
    with for_generation(model, context, tokens) as in_step:
        return evaluate(
            model,
            tokenizer,
            examples[: settings.limit],
            prompt=config.data.prompt,
            max_new_tokens=settings.max_new_tokens,
            batch_size=settings.batch_size,
            kind=config.data.test.answer_kind,
            rank=context.rank,
            world_size=context.world_size,
            gather=context.gather,
            in_step=in_step,
            show_progress=show_progress and context.is_main,
        )


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
    with context.raise_on_all_ranks():
        checkpoint = open_checkpoint(config.model.path, config.model.revision)
        tokenizer = required_tokenizer(checkpoint)
        choose_pad_token(tokenizer)
        test = load_test(config.data, tokenizer)
    if test.skipped and context.is_main:
        first = test.skipped[0]
        print(
            f"{len(test.skipped)} test rows left out, the first: {first.origin}: {first.reason}",
            file=sys.stderr,
        )
    examples = _of_task(test.examples, task)
    wanted = config.evaluation.quantization
    quantize = None if wanted is None or adapter is None else Quantization(wanted)
    model = load_with_adapter(checkpoint, config.model, context, adapter, quantize)
    scores = score_model(model, tokenizer, examples, config, context)
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
