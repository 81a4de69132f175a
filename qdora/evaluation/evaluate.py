"""Evaluation of a model on examples: prompts, generation, scoring, task by task."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qdora.config import AnswerKind
from qdora.data.rows import Example
from qdora.data.templates import prompt_ids_of_all
from qdora.data.tokenize import choose_pad_token
from qdora.errors import InputError
from qdora.evaluation.generation import Generation, check_prompts, eos_token_ids, generate
from qdora.evaluation.scores import Prediction, Scores, summarize
from qdora.tasks.declared import Task, task_for
from qdora.tasks.scoring import SCORERS, Verdict, score_output

__all__ = ["Gather", "Scores", "evaluate"]

Gather = Callable[[list[Any]], list[Any]]
"""Takes each process's list, gives every process all of them joined: `accelerate.utils.gather_object`."""


@dataclass(frozen=True)
class _Setup:
    """What stays the same over the tasks of one evaluation."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompt: str
    max_new_tokens: int
    batch_size: int
    rank: int
    world_size: int
    gather: Gather
    in_step: bool
    show_progress: bool

    def decoding(self) -> dict[str, object]:
        """How answers are generated, for the report."""
        return {
            "method": "greedy",
            "prompt": self.prompt,
            "max_new_tokens": self.max_new_tokens,
            "batch_size": self.batch_size,
            "processes": self.world_size,
            "eos_token_ids": eos_token_ids(self.model, self.tokenizer),
        }


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    prompt: str,
    max_new_tokens: int,
    batch_size: int,
    kind: AnswerKind = "numeric",
    rank: int = 0,
    world_size: int = 1,
    gather: Gather = list,
    in_step: bool = False,
    show_progress: bool = True,
) -> list[Scores]:
    """Generate an answer to every example and score it by exact match.

    Several processes call this together, each with all the examples; each generates its share and
    all return the same scores.

    Args:
        prompt: name of the prompt template.
        max_new_tokens: longest answer in tokens.
        batch_size: prompts generated together, per process.
        kind: how answers of a user's own data are compared; known tasks have theirs.
        rank, world_size: this process and the number of them.
        gather: joins the lists of all processes; needed from two processes on.
        in_step: the processes share one sharded model, and call it equally often.
        show_progress: a bar per task on stderr, on the first process.
    Returns: one `Scores` per task, in the order of their first example.
    Raises: InputError: no examples, unknown template, a prompt longer than the model's context
        allows, or a choice task whose answer words cannot be told.
    """
    if not examples:
        raise InputError("evaluation: there are no examples to score")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of {world_size} processes")
    setup = _Setup(
        model,
        tokenizer,
        prompt,
        max_new_tokens,
        batch_size,
        rank,
        world_size,
        gather,
        in_step,
        show_progress and rank == 0,
    )
    groups = _by_task(examples, kind)
    prompts = [prompt_ids_of_all(tokenizer, prompt, [e.question for e in group]) for _, group in groups]
    for (_, group), ids in zip(groups, prompts, strict=True):
        _check(setup, group, ids)
    return [_evaluate_task(setup, *group, ids) for group, ids in zip(groups, prompts, strict=True)]


def _by_task(examples: Sequence[Example], kind: AnswerKind) -> list[tuple[Task, list[Example]]]:
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.task, []).append(example)
    return [(_with_answer_words(task_for(name, kind), group), group) for name, group in groups.items()]


def _with_answer_words(task: Task, examples: Sequence[Example]) -> Task:
    """A choice task of the user's own data has the answer words that its gold answers show."""
    if task.kind != "choice" or task.answer_words:
        return task
    words = {example.answer for example in examples if example.answer}
    if len(words) < 2:
        raise InputError(
            f"task {task.name!r}: a choice task needs at least two different gold answers, "
            f"its {len(examples)} examples have {sorted(words)}; give more examples or another answer_kind"
        )
    # Longest first: "answer1" must not be found in "answer10".
    return replace(task, answer_words=tuple(sorted(words, key=lambda word: (-len(word), word))))


def _check(setup: _Setup, examples: Sequence[Example], prompts: Sequence[Sequence[int]]) -> None:
    for example, ids in zip(examples, prompts, strict=True):
        try:
            check_prompts(setup.model, [ids], setup.max_new_tokens)
        except InputError as error:
            raise InputError(f"{example.origin}: {error}") from None


def _evaluate_task(
    setup: _Setup, task: Task, examples: Sequence[Example], prompts: Sequence[Sequence[int]]
) -> Scores:
    started = time.perf_counter()
    generations = _generate_all(setup, task, examples, prompts)
    seconds = max(setup.gather([time.perf_counter() - started]))
    predictions = [
        _prediction(setup, task, example, ids, generation)
        for example, ids, generation in zip(examples, prompts, generations, strict=True)
    ]
    return summarize(task, predictions, setup.decoding(), seconds)


def _generate_all(
    setup: _Setup, task: Task, examples: Sequence[Example], prompts: Sequence[Sequence[int]]
) -> list[Generation]:
    """Every example's generation, on every process."""
    share = _share([len(ids) for ids in prompts], setup.rank, setup.world_size)
    with tqdm(total=len(share), desc=task.name, unit="question", disable=not setup.show_progress) as bar:
        correct = done = 0

        def progress(batch: Mapping[int, Generation]) -> None:
            nonlocal correct, done
            for position, generation in batch.items():
                correct += _judge(task, examples[share[position]], generation)[SCORERS[task.kind][0]].correct
            done += len(batch)
            bar.set_postfix_str(f"exact match {correct / done:.1%}", refresh=False)
            bar.update(len(batch))

        own = generate(
            setup.model,
            setup.tokenizer,
            [prompts[index] for index in share],
            pad_id=choose_pad_token(setup.tokenizer),
            max_new_tokens=setup.max_new_tokens,
            batch_size=setup.batch_size,
            progress=progress,
            synced=setup.in_step and setup.world_size > 1,
        )
    gathered: list[tuple[int, Generation]] = setup.gather(list(zip(share, own, strict=True)))
    # A share may repeat the first example to fill it up; greedy answers to it are the same.
    by_index = dict(gathered)
    if sorted(by_index) != list(range(len(examples))):
        raise RuntimeError(
            f"{len(by_index)} of {len(examples)} examples came back from {setup.world_size} processes"
        )
    return [by_index[index] for index in range(len(examples))]


def _share(lengths: Sequence[int], rank: int, world_size: int) -> list[int]:
    """This process's examples: dealt out by length, so that all processes have like work.

    Shares are of one size, the last ones filled up with the longest example again: processes with
    a sharded model must call it equally often.
    """
    order = sorted(range(len(lengths)), key=lambda index: lengths[index], reverse=True)
    size = -(-len(order) // world_size)
    share = order[rank::world_size]
    return share + order[:1] * (size - len(share))


def _judge(task: Task, example: Example, generation: Generation) -> dict[str, Verdict]:
    return score_output(task, generation.text, answer=example.answer, completion=example.completion)


def _prediction(
    setup: _Setup, task: Task, example: Example, ids: Sequence[int], generation: Generation
) -> Prediction:
    verdicts = _judge(task, example, generation)
    headline = verdicts[SCORERS[task.kind][0]]
    return Prediction(
        origin=example.origin,
        prompt=str(setup.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)),
        output=generation.text,
        extracted=headline.extracted,
        gold=headline.gold,
        correct=headline.correct,
        tokens=generation.tokens,
        stopped=generation.stopped,
        scorers=verdicts,
    )
