"""Evaluation of a model on examples: prompts, generation or ranking, scoring, task by task."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Never, TypeVar, Unpack

from tqdm import tqdm

from qdora.config import AnswerKind, DatasetConfig, EvaluationMethod, EvaluationWeights, RunConfig
from qdora.data.padding import choose_pad_token, eos_token_ids
from qdora.data.rows import Example
from qdora.data.templates import PROMPTS
from qdora.data.vocabulary import check_questions, embedding_rows, fit_padding
from qdora.distributed.context import DistributedContext
from qdora.distributed.fsdp import for_generation
from qdora.errors import InputError, suggest
from qdora.evaluation.continuous import SPARE_COLUMNS, why_not
from qdora.evaluation.generation import (
    Generation,
    NonFiniteLogitsError,
    generate,
)
from qdora.evaluation.groups import Decoding, Group, check_group, group_by_task
from qdora.evaluation.likelihood import rank, ranked_options, score_options
from qdora.evaluation.scores import Prediction, Scores, locked_reports, summarize, write_scores
from qdora.evaluation.weights import evaluation_weights
from qdora.models.load import adapter_rows, load_with_adapter, required_tokenizer
from qdora.models.sources import open_checkpoint
from qdora.quant import Quantization
from qdora.tasks import check_run
from qdora.tasks.prepare import Split, for_rows, load_split
from qdora.tasks.scoring import Verdict
from qdora.tasks.shots import draw_shots

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")

_HOW: Mapping[EvaluationMethod, str] = {
    "generate": "greedy",
    "rank": "likelihood",
    "both": "greedy and likelihood",
}


def evaluate_configured(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    config: RunConfig,
    context: DistributedContext,
    *,
    shots: Mapping[str, Sequence[Example]],
    split: Split = "test",
    show_progress: bool = True,
) -> list[Scores]:
    """`evaluate` with the prompt, the answer kind and the `evaluation` section of a run.

    Args:
        shots: of `draw_shots`.
        split: that the examples are of; left-out training examples have the training set's kind of answers.
    Raises: InputError: as `evaluate`.
    """
    settings = config.evaluation
    own = config.data.test if split == "test" else config.data.validation
    source = own if isinstance(own, DatasetConfig) else config.data.train
    return evaluate(
        model,
        tokenizer,
        examples[: settings.limit],
        prompt=config.data.prompt,
        parse_special_tokens=config.data.parse_special_tokens,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        kind=source.answer_kind,
        method=settings.method,
        shots=shots,
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
    split: Split = "test",
) -> list[Scores]:
    """Load a run's base and examples, load the adapter onto it, score, write the reports; a collective.

    Args:
        adapter: folder in PEFT's format; None scores the base alone.
        folder: where reports go; None writes none.
        task: only this task of the split.
        split: that is scored.
    Raises: InputError: anything that cannot be loaded, or no example of the task.
    """
    with context.on_main_rank(lambda: nullcontext() if folder is None else locked_reports(folder, task)):
        _, score_model = load_for_evaluation(config, adapter, context, task=task, split=split)
        scores = score_model()
        if context.is_main and folder is not None:
            for score in scores:
                write_scores(score, folder)
        context.barrier()
    return scores


def load_for_evaluation(
    config: RunConfig,
    adapter: Path | None,
    context: DistributedContext,
    *,
    task: str | None = None,
    split: Split = "test",
) -> tuple[PreTrainedModel, Callable[[], list[Scores]]]:
    """A run's base with an adapter, and what scores it, as it is then, on a split; a collective.

    Args, Raises: as `evaluate_adapter`.
    """
    with context.raise_on_all_ranks():
        check_run(config)
        checkpoint = open_checkpoint(config.model.path, config.model.revision)
        tokenizer = required_tokenizer(checkpoint, config.data.chat_template, adapter=adapter)
        rows = adapter_rows(adapter, embedding_rows(checkpoint.config))
        padding = fit_padding(tokenizer, rows)
        found = load_split(config.data, tokenizer, split)
        examples = [example for example in found.examples if task in (None, example.task)]
        if not examples:
            names = {example.task for example in found.examples}
            raise InputError(f"--task {task!r}: the {split} set has none; {suggest(str(task), names)}")
        config = config.model_copy(update={"data": for_rows(config.data, examples)})
        check_questions(tokenizer, rows, config.data, examples[: config.evaluation.limit])
        shots = draw_shots(config, tokenizer, examples)
    if padding is not None:
        context.say(padding)
    if found.skipped:
        context.say(f"{len(found.skipped)} {split} rows left out, the first: {found.skipped[0]}")
    quantization = config.evaluation.quantization
    quantize = Quantization(quantization) if quantization and adapter else None
    model = load_with_adapter(checkpoint, config.model, context, adapter, quantize)
    return model, lambda: evaluate_configured(
        model, tokenizer, examples, config, context, shots=shots, split=split
    )


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    kind: AnswerKind = "numeric",
    method: EvaluationMethod = "generate",
    shots: Mapping[str, Sequence[Example]] | None = None,
    weights: EvaluationWeights = "auto",
    context: DistributedContext | None = None,
    show_progress: bool = True,
    **decoding: Unpack[Decoding],
) -> list[Scores]:
    """Generate an answer to every example and score it by exact match, or rank its options.

    A collective: every rank calls it with all examples, generates the answers to some of them, and
    returns the same scores.

    Args:
        kind: how answers of the user's own data are compared; registered tasks have theirs.
        method: `rank`: choose among a choice's options by their likelihood, the headline scorer then;
            `both`: do that beside generation, whose scorer stays the headline.
        shots: by task, examples that stand with their completions before each question.
        weights: `merged`: compute with one dense matrix a layer; `adapted`: with weight and adapter as they
            are; `auto`: merged where the memory is there.
        context: rank and world size; a single process where not given.
        show_progress: a bar per task on stderr, on the main rank.
        decoding: prompt template, `max_new_tokens`, `batch_size`, `parse_special_tokens`.
    Returns: one `Scores` per task, in the order of their first example.
    Raises:
        InputError: no examples, unknown template, a prompt longer than the model's context allows, or a
            choice task whose answer words are unknown; ranking of what is no choice, or has unknown options;
            a token that the model's embedding has no row for; logits that are not finite.
        TypeError: an option of decoding is missing or unknown.
    """
    if wrong := Decoding.__required_keys__ ^ (decoding.keys() - Decoding.__optional_keys__):
        raise TypeError(f"evaluate(): missing or unknown: {', '.join(sorted(wrong))}")
    if not examples:
        raise InputError("evaluation: there are no examples to score")
    context = context or DistributedContext()
    groups = group_by_task(tokenizer, decoding, examples, kind, method, shots or {})
    choose_pad_token(tokenizer, embedding_rows(model.config))
    for group in groups:
        check_group(model, tokenizer, group, method, decoding)
    longest = max(len(ids) for group in groups for ids in group.prompts)
    ranked = max((question.tokens for group in groups for question in group.questions), default=0)
    generated = 0 if method == "rank" else longest + decoding["max_new_tokens"] + SPARE_COLUMNS
    tokens = decoding["batch_size"] * max(generated, ranked)
    if method != "rank" and (reason := why_not(model)):
        context.say(f"no prompt takes the place of a finished answer before its batch ends: {reason}")
    show_progress = show_progress and context.is_main
    with (
        evaluation_weights(model, context, weights, tokens) as used,
        for_generation(model, context, tokens) as sharded,
    ):
        synced = sharded and context.world_size > 1
        scores = [
            _evaluate_task(model, tokenizer, group, context, decoding, method, synced, show_progress)
            for group in groups
        ]
    return [replace(score, decoding=score.decoding | {"weights": used}) for score in scores]


def _evaluate_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    group: Group,
    context: DistributedContext,
    decoding: Decoding,
    method: EvaluationMethod,
    synced: bool,
    show_progress: bool,
) -> Scores:
    """Generate and rank on every rank its part of the answers, gather them on all ranks, score."""
    started = time.perf_counter()
    generated: dict[int, tuple[Generation, dict[str, Verdict]]] = {}
    sums: dict[int, list[float]] = {}
    if method != "rank":
        generated = _generate(model, tokenizer, group, context, decoding, synced, show_progress)
    if method != "generate":
        sums = _rank(model, tokenizer, group, context, decoding, show_progress)
    seconds = max(context.gather([time.perf_counter() - started]))
    predictions = [
        _prediction(tokenizer, group, index, generated.get(index), sums.get(index))
        for index in range(len(group.examples))
    ]
    how: dict[str, object] = {"method": _HOW[method], **decoding, "processes": context.world_size}
    if method == "rank":
        del how["max_new_tokens"]
    else:
        how["batching"] = "fixed" if why_not(model) else "continuous"
        how["eos_token_ids"] = eos_token_ids(model, tokenizer)
    if group.shots:
        how["shots"] = [shot.origin for shot in group.shots]
    return summarize(group.task, predictions, how, seconds)


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    group: Group,
    context: DistributedContext,
    decoding: Decoding,
    synced: bool,
    show_progress: bool,
) -> dict[int, tuple[Generation, dict[str, Verdict]]]:
    """Answers and their verdicts by index, on all ranks."""
    task = group.task

    def work(chosen: list[int], bar: tqdm[Never]) -> list[tuple[Generation, dict[str, Verdict]]]:
        verdicts: dict[int, dict[str, Verdict]] = {}

        def progress(batch: Mapping[int, Generation]) -> None:
            for position, generation in batch.items():
                verdicts[position] = task.score(generation.text, group.examples[chosen[position]])
            _show(bar, "exact match", [of[task.scorers[0]] for of in verdicts.values()], len(batch))

        generations = generate(
            model,
            tokenizer,
            [group.prompts[index] for index in chosen],
            pad_id=int(tokenizer.pad_token_id),
            max_new_tokens=decoding["max_new_tokens"],
            batch_size=decoding["batch_size"],
            progress=progress,
            synced=synced,
            stop=PROMPTS[decoding["prompt"]].next_question if group.shots else None,
        )
        return [(generation, verdicts[position]) for position, generation in enumerate(generations)]

    return _on_all_ranks(context, group, [len(ids) for ids in group.prompts], work, show_progress)


def _rank(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    group: Group,
    context: DistributedContext,
    decoding: Decoding,
    show_progress: bool,
) -> dict[int, list[float]]:
    """Log-probabilities of the options by index of their question, on all ranks."""

    def work(chosen: list[int], bar: tqdm[Never]) -> list[list[float]]:
        verdicts: list[Verdict] = []

        def progress(batch: Mapping[int, list[float]]) -> None:
            for position, sums in batch.items():
                index = chosen[position]
                ranked = rank(group.questions[index], sums, group.examples[index].answer)
                verdicts.append(ranked["likelihood"])
            _show(bar, "accuracy", verdicts, len(batch))

        return score_options(
            model,
            group.questions,
            chosen,
            pad_id=int(tokenizer.pad_token_id),
            batch_size=decoding["batch_size"],
            progress=progress,
        )

    lengths = [question.tokens for question in group.questions]
    return _on_all_ranks(context, group, lengths, work, show_progress)


def _show(bar: tqdm[Never], metric: str, verdicts: Sequence[Verdict], new: int) -> None:
    correct = sum(verdict.correct for verdict in verdicts)
    bar.set_postfix_str(f"{metric} {correct / len(verdicts):.1%}", refresh=False)
    bar.update(new)


def _on_all_ranks(
    context: DistributedContext,
    group: Group,
    lengths: Sequence[int],
    work: Callable[[list[int], tqdm[Never]], list[T]],
    show_progress: bool,
) -> dict[int, T]:
    """Divide the examples over the ranks, and gather the results by index; a collective.

    Args:
        lengths: of each example, for an even division.
        work: the results of the examples of this rank, by their indices.
    """
    chosen = _rank_indices(lengths, context.rank, context.world_size)
    results: list[T] = []
    failure = None
    with tqdm(total=len(chosen), desc=group.task.name, unit="question", disable=not show_progress) as bar:
        try:
            results = work(chosen, bar)
        except NonFiniteLogitsError as error:
            failure = error
        with context.raise_on_all_ranks():
            if failure is not None:
                raise failure
    # An example that several ranks have computed has the same result on all of them.
    by_index = dict(context.gather(list(zip(chosen, results, strict=True))))
    if len(by_index) != len(group.examples):
        raise RuntimeError(
            f"{len(by_index)} of {len(group.examples)} examples were scored on {context.world_size} ranks"
        )
    return by_index


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
    group: Group,
    index: int,
    generated: tuple[Generation, dict[str, Verdict]] | None,
    sums: Sequence[float] | None,
) -> Prediction:
    example = group.examples[index]
    generation, verdicts = generated or (Generation("", 0, True), {})
    if sums is not None:
        verdicts = verdicts | rank(group.questions[index], sums, example.answer)
    return Prediction(
        origin=example.origin,
        prompt=str(tokenizer.decode(list(group.prompts[index]), clean_up_tokenization_spaces=False)),
        output=generation.text,
        **vars(next(iter(verdicts.values()))),
        tokens=generation.tokens,
        stopped=generation.stopped,
        scorers=verdicts,
        options=() if sums is None else ranked_options(group.questions[index], sums),
    )
