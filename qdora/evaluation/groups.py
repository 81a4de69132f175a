"""The examples of each task as prompts, and as choices where their options are ranked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypedDict

from qdora.config import AnswerKind, EvaluationMethod
from qdora.data.rows import Example
from qdora.data.templates import Shot
from qdora.data.tokenize import prompt_ids
from qdora.data.vocabulary import check_ids, embedding_rows
from qdora.errors import InputError
from qdora.evaluation.generation import check_prompts
from qdora.evaluation.likelihood import Question, check_lengths, read_questions
from qdora.tasks import check_method, task_for
from qdora.tasks.base import Task, longest_first

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
class Group:
    """The examples of one task, and the token ids of their prompts.

    Attributes:
        prompts: for generation.
        questions: for ranking; empty where nothing is ranked.
        shots: the examples in the prompts before the question.
    """

    task: Task
    examples: Sequence[Example]
    prompts: Sequence[Sequence[int]]
    questions: Sequence[Question]
    shots: Sequence[Example]


def group_by_task(
    tokenizer: PreTrainedTokenizerBase,
    decoding: Decoding,
    examples: Sequence[Example],
    kind: AnswerKind,
    method: EvaluationMethod,
    shots: Mapping[str, Sequence[Example]],
) -> list[Group]:
    """The groups in the order of their first examples.

    Args:
        kind, method, shots: as for `evaluate`.
    Raises: InputError: as `evaluate`, of tasks, templates and options.
    """
    by_name: dict[str, list[Example]] = {}
    for example in examples:
        by_name.setdefault(example.task, []).append(example)
    prompt, special = decoding["prompt"], decoding.get("parse_special_tokens", False)
    groups = []
    for name, of_task in by_name.items():
        task = task_for(name, kind)
        check_method(method, name, task.kind)
        task = _with_answer_words(task, of_task)
        own: list[Shot] = [(shot.question, shot.completion) for shot in shots.get(name, ())]
        asked = [example.asked for example in of_task]
        prompts = prompt_ids(tokenizer, prompt, asked, parse_special_tokens=special, shots=own)
        questions: list[Question] = []
        if method != "generate":
            questions = read_questions(
                tokenizer, task, of_task, prompt, parse_special_tokens=special, shots=own
            )
        groups.append(Group(task, of_task, prompts, questions, shots.get(name, ())))
    return groups


def check_group(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    group: Group,
    method: EvaluationMethod,
    decoding: Decoding,
) -> None:
    """Refuse what the model has no embedding for, or no room in its context.

    Raises: InputError: the example is named.
    """
    origins = [example.origin for example in group.examples]
    rows = embedding_rows(model.config)
    check_ids(tokenizer, rows, zip(origins, group.prompts, strict=True))
    if method != "rank":
        check_prompts(model, group.prompts, decoding["max_new_tokens"], origins)
    if method != "generate":
        for origin, question in zip(origins, group.questions, strict=True):
            check_ids(tokenizer, rows, ((origin, ids) for ids in question.continuations))
        check_lengths(model, group.questions, origins)


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
    return replace(task, words=longest_first(words))
