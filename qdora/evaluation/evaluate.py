"""Evaluation of a model on examples: prompts, generation, scoring, task by task."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack

from tqdm import tqdm

from qdora.config import AnswerKind, EvaluationWeights, RunConfig
from qdora.data.rows import Example
from qdora.data.tokenize import choose_pad_token, prompt_ids
from qdora.data.vocabulary import check_ids, check_questions, embedding_rows, fit_padding
from qdora.distributed.context import DistributedContext
from qdora.distributed.fsdp import for_generation
from qdora.errors import InputError, suggest
from qdora.evaluation.continuous import SPARE_COLUMNS, why_not
from qdora.evaluation.generation import (
    Generation,
    NonFiniteLogitsError,
    check_prompts,
    eos_token_ids,
    generate,
)
from qdora.evaluation.scores import Prediction, Scores, locked_reports, summarize, write_scores
from qdora.evaluation.weights import evaluation_weights
from qdora.models.load import load_with_adapter, required_tokenizer
from qdora.models.sources import open_checkpoint
from qdora.quant import Quantization
from qdora.tasks import check_data, task_for
from qdora.tasks.base import Task
from qdora.tasks.prepare import load_test

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class _Required(TypedDict):
    prompt: str
    """Name of the prompt template."""
    max_new_tokens: int
    """Longest answer in tokens."""
    batch_size: int
    """Prompts generated at once, per rank."""


class Decoding(_Required, total=False):
    """How answers are generated, greedily."""

    parse_special_tokens: bool
    """Whether the text of a special token in a question is that token; text where not given."""


@dataclass(frozen=True)
class _Group:
    """The examples of one task, and the token ids of their prompts."""

    task: Task
    examples: Sequence[Example]
    prompts: Sequence[Sequence[int]]


def evaluate_configured(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    config: RunConfig,
    context: DistributedContext,
    *,
    show_progress: bool = True,
) -> list[Scores]:
    """`evaluate` with the prompt, the answer kind and the `evaluation` section of a run.

    Raises: InputError: as `evaluate`.
    """
    settings = config.evaluation
    return evaluate(
        model,
        tokenizer,
        examples[: settings.limit],
        prompt=config.data.prompt,
        parse_special_tokens=config.data.parse_special_tokens,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        kind=config.data.test.answer_kind,
        weights=settings.weights,
        context=context,
        show_progress=show_progress,
    )


def evaluate_adapter(
    config: RunConfig,
    adapter: Path | None,
    context: DistributedContext,
    *,
    folder: Path | None = None,
    task: str | None = None,
) -> list[Scores]:
    """Load a run's base and test set, load the adapter onto it, score, write the reports; a collective.

    Args:
        adapter: folder in PEFT's format; None scores the base alone.
        folder: where reports go; None writes none.
        task: only this task of the test set.
    Raises: InputError: anything that cannot be loaded, or no example of the task.
    """
    with context.on_main_rank(lambda: nullcontext() if folder is None else locked_reports(folder, task)):
        _, score_model = load_for_evaluation(config, adapter, context, task=task)
        scores = score_model()
        if context.is_main and folder is not None:
            for score in scores:
                write_scores(score, folder)
        context.barrier()
    return scores


def load_for_evaluation(
    config: RunConfig, adapter: Path | None, context: DistributedContext, *, task: str | None = None
) -> tuple[PreTrainedModel, Callable[[], list[Scores]]]:
    """A run's base with an adapter, and what scores it, as it is then, on the run's test set; a collective.

    Args, Raises: as `evaluate_adapter`.
    """
    with context.raise_on_all_ranks():
        check_data(config.data)
        checkpoint = open_checkpoint(config.model.path, config.model.revision)
        tokenizer, rows = required_tokenizer(checkpoint), embedding_rows(checkpoint.config)
        padding = fit_padding(tokenizer, rows)
        test = load_test(config.data, tokenizer)
        examples = [example for example in test.examples if task in (None, example.task)]
        if not examples:
            names = {example.task for example in test.examples}
            raise InputError(f"--task {task!r}: the test set has none; {suggest(str(task), names)}")
        check_questions(tokenizer, rows, config.data, examples[: config.evaluation.limit])
    if padding is not None:
        context.say(padding)
    if test.skipped:
        context.say(f"{len(test.skipped)} test rows left out, the first: {test.skipped[0]}")
    quantization = config.evaluation.quantization
    quantize = Quantization(quantization) if quantization and adapter else None
    model = load_with_adapter(checkpoint, config.model, context, adapter, quantize)
    return model, lambda: evaluate_configured(model, tokenizer, examples, config, context)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    kind: AnswerKind = "numeric",
    weights: EvaluationWeights = "auto",
    context: DistributedContext | None = None,
    show_progress: bool = True,
    **decoding: Unpack[Decoding],
) -> list[Scores]:
    """Generate an answer to every example and score it by exact match.

    A collective: every rank calls it with all examples, generates the answers to some of them, and
    returns the same scores.

    Args:
        kind: how answers of the user's own data are compared; registered tasks have theirs.
        weights: `merged`: compute with one dense matrix a layer; `adapted`: with weight and adapter as they
            are; `auto`: merged where the memory is there.
        context: rank and world size; a single process where not given.
        show_progress: a bar per task on stderr, on the main rank.
        decoding: prompt template, `max_new_tokens`, `batch_size`, `parse_special_tokens`.
    Returns: one `Scores` per task, in the order of their first example.
    Raises:
        InputError: no examples, unknown template, a prompt longer than the model's context allows, or a
            choice task whose answer words are unknown; a token that the model's embedding has no row
            for; logits that are not finite.
        TypeError: an option of decoding is missing or unknown.
    """
    if wrong := Decoding.__required_keys__ ^ (decoding.keys() - Decoding.__optional_keys__):
        raise TypeError(f"evaluate(): missing or unknown: {', '.join(sorted(wrong))}")
    if not examples:
        raise InputError("evaluation: there are no examples to score")
    context = context or DistributedContext()
    groups = _by_task(tokenizer, decoding, examples, kind)
    rows = embedding_rows(model.config)
    choose_pad_token(tokenizer, rows)
    for group in groups:
        origins = [example.origin for example in group.examples]
        check_ids(tokenizer, rows, zip(origins, group.prompts, strict=True))
        check_prompts(model, group.prompts, decoding["max_new_tokens"], origins)
    longest = max(len(ids) for group in groups for ids in group.prompts)
    tokens = decoding["batch_size"] * (longest + decoding["max_new_tokens"] + SPARE_COLUMNS)
    if reason := why_not(model):
        context.say(f"no prompt takes the place of a finished answer before its batch ends: {reason}")
    show_progress = show_progress and context.is_main
    with (
        evaluation_weights(model, context, weights, tokens) as used,
        for_generation(model, context, tokens) as sharded,
    ):
        synced = sharded and context.world_size > 1
        scores = [
            _evaluate_task(model, tokenizer, group, context, decoding, synced, show_progress)
            for group in groups
        ]
    return [replace(score, decoding=score.decoding | {"weights": used}) for score in scores]


def _by_task(
    tokenizer: PreTrainedTokenizerBase, decoding: Decoding, examples: Sequence[Example], kind: AnswerKind
) -> list[_Group]:
    by_name: dict[str, list[Example]] = {}
    for example in examples:
        by_name.setdefault(example.task, []).append(example)
    return [
        _Group(
            _with_answer_words(task_for(name, kind), of_task),
            of_task,
            prompt_ids(
                tokenizer,
                decoding["prompt"],
                [example.question for example in of_task],
                parse_special_tokens=decoding.get("parse_special_tokens", False),
            ),
        )
        for name, of_task in by_name.items()
    ]


def _with_answer_words(task: Task, examples: Sequence[Example]) -> Task:
    """A choice task of the user's own data has the answer words that its gold answers show."""
    if task.kind != "choice" or task.words:
        return task
    words = {example.answer for example in examples if example.answer}
    if len(words) < 2:
        raise InputError(
            f"task {task.name!r}: a choice task needs at least two different gold answers, "
            f"its {len(examples)} examples have {sorted(words)}; give more examples or another answer_kind"
        )
    # Longest first: "answer1" must not be found in "answer10".
    return replace(task, words=tuple(sorted(words, key=lambda word: (-len(word), word))))


def _evaluate_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    group: _Group,
    context: DistributedContext,
    decoding: Decoding,
    synced: bool,
    show_progress: bool,
) -> Scores:
    """Generate on every rank its part of the answers, gather them on all ranks, score."""
    task, examples, prompts = group.task, group.examples, group.prompts
    chosen = _rank_indices([len(ids) for ids in prompts], context.rank, context.world_size)
    started = time.perf_counter()
    with tqdm(total=len(chosen), desc=task.name, unit="question", disable=not show_progress) as bar:
        correct = done = 0

        def progress(batch: Mapping[int, Generation]) -> None:
            nonlocal correct, done
            for position, generation in batch.items():
                verdicts = task.score(generation.text, examples[chosen[position]])
                correct += verdicts[task.scorers[0]].correct
            done += len(batch)
            bar.set_postfix_str(f"exact match {correct / done:.1%}", refresh=False)
            bar.update(len(batch))

        generations, failure = [], None
        try:
            generations = generate(
                model,
                tokenizer,
                [prompts[index] for index in chosen],
                pad_id=int(tokenizer.pad_token_id),
                max_new_tokens=decoding["max_new_tokens"],
                batch_size=decoding["batch_size"],
                progress=progress,
                synced=synced,
            )
        except NonFiniteLogitsError as error:
            failure = error
        with context.raise_on_all_ranks():
            if failure is not None:
                raise failure
    # An example that several ranks generate has the same greedy answer on all of them.
    by_index = dict(context.gather(list(zip(chosen, generations, strict=True))))
    seconds = max(context.gather([time.perf_counter() - started]))
    if len(by_index) != len(examples):
        raise RuntimeError(
            f"{len(by_index)} of {len(examples)} examples were generated on {context.world_size} ranks"
        )
    predictions = [
        _prediction(tokenizer, task, example, ids, by_index[index])
        for index, (example, ids) in enumerate(zip(examples, prompts, strict=True))
    ]
    how = {
        "method": "greedy",
        "batching": "fixed" if why_not(model) else "continuous",
        **decoding,
        "processes": context.world_size,
        "eos_token_ids": eos_token_ids(model, tokenizer),
    }
    return summarize(task, predictions, how, seconds)


def _rank_indices(lengths: Sequence[int], rank: int, world_size: int) -> list[int]:
    """The examples that a rank generates: assigned by length, so that all ranks have similar work.

    All ranks get equally many, the last ones the longest example again: ranks of a sharded model must
    call it equally often.
    """
    order = sorted(range(len(lengths)), key=lambda index: lengths[index], reverse=True)
    chosen = order[rank::world_size]
    return chosen + order[:1] * (-(-len(order) // world_size) - len(chosen))


def _prediction(
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    example: Example,
    ids: Sequence[int],
    generation: Generation,
) -> Prediction:
    verdicts = task.score(generation.text, example)
    headline = verdicts[task.scorers[0]]
    return Prediction(
        origin=example.origin,
        prompt=str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)),
        output=generation.text,
        **vars(headline),
        tokens=generation.tokens,
        stopped=generation.stopped,
        scorers=verdicts,
    )
