"""Rows as they are read, the examples that tasks make of them, and the rows that are bad."""

from __future__ import annotations

import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal, NamedTuple

from qdora.errors import DataError, suggest

IN_MEMORY = 20_000
"""Most rows of a source, or examples of a set, that are held as objects; of more there is a table on disk."""

Role = Literal["system", "user", "assistant"]


class Turn(NamedTuple):
    """One turn of a chat."""

    role: Role
    content: str
    trained: bool = True
    """Of an assistant's turn: false where the data says that it carries no loss."""


@dataclass(frozen=True, slots=True)
class Example:
    """One question with the text to train on and the gold answer, which a chat has in its turns."""

    question: str
    """What goes into the prompt."""
    completion: str
    """What is trained on, without EOS."""
    answer: str
    """Gold answer."""
    task: str
    """Names the scoring rule and the report: `synthetic`, `gsm8k`, `boolq`, a file's name."""
    origin: str
    """`file:line` or `dataset[index]`; named in errors."""
    options: tuple[str, ...] = ()
    """The answers to choose from, where the question does not list them itself."""
    turns: tuple[Turn, ...] = ()
    """Of a chat: all of it. The completion is its last assistant turn, the question what comes before."""

    @property
    def asked(self) -> str | tuple[Turn, ...]:
        """What a model answers with the completion: the question, or the turns of a chat before it."""
        return self.turns[: last_answer(self.turns)] if self.turns else self.question

    @property
    def texts(self) -> list[str]:
        """All texts that become tokens in training."""
        return [turn.content for turn in self.turns] or [self.question, self.completion]

    @property
    def questions(self) -> list[str]:
        """What may be a question of another set too: the question, and each that a user asks in a chat."""
        return [self.question, *(turn.content for turn in self.turns if turn.role == "user")]


def last_answer(turns: Sequence[Turn]) -> int:
    """The index of the last assistant turn.

    Raises: ValueError: there is none.
    """
    return max(i for i, turn in enumerate(turns) if turn.role == "assistant")


@dataclass(frozen=True, slots=True)
class Skipped:
    """A row that was left out."""

    origin: str
    reason: str

    def __str__(self) -> str:
        return f"{self.origin}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Dataset:
    """The examples of one split, and the rows that could not be used."""

    examples: Sequence[Example]
    skipped: list[Skipped]


def fingerprint(examples: Iterable[Example]) -> str:
    """sha256 over what the examples say and their order; where they came from does not count."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(example_bytes(example))
    return digest.hexdigest()


def example_bytes(example: Example) -> bytes:
    """What an example says."""
    contents: list[object] = [example.question, example.completion, example.answer, example.task]
    contents += [*example.options, *example.turns]
    # JSON keeps the fields apart: ("ab", "c") and ("a", "bc") must differ.
    return json.dumps(contents).encode() + b"\n"


_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
# Everything but word characters and what carries meaning in a formula: operators, a sign or minus
# before a digit, a decimal point.
_PUNCTUATION = re.compile(r"(?!(?<=\d)\.\d)(?!-\s*\d)[^\w+*/=<>^%]|_")


def normalize(question: str) -> str:
    """Case, Unicode form (NFKC), spacing and punctuation made alike; numbers and operators kept.

    Without the operators `5 - 3` and `5 + 3`, or `2.5` and `25`, would be the same question.
    """
    text = unicodedata.normalize("NFKC", question).casefold()
    return " ".join(_PUNCTUATION.sub(" ", _THOUSANDS.sub("", text)).split())


def question_key(question: str) -> int:
    """64 bits of a digest of `normalize`: equal questions among millions are found without their texts."""
    text = normalize(question).encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)


BadRows = Literal["stop", "skip"]


class BadRowError(Exception):
    """A row cannot become an example; the message is the reason, without the row's origin."""


def raise_for_skipped(skipped: Sequence[Skipped], bad_rows: BadRows) -> None:
    """Raise for the first bad row if `bad_rows` is `stop`.

    Raises: DataError: names file and line, the reason, and how many more bad rows there are.
    """
    if bad_rows == "skip" or not skipped:
        return
    others = len(skipped) - 1
    more = f"; {others} more bad row{'s' if others > 1 else ''} after it" if others else ""
    raise DataError(f"{skipped[0]}{more} (data.bad_rows: skip leaves such rows out)")


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a file or hub dataset; with a problem where it could not even be read."""

    origin: str
    values: Mapping[str, object]
    problem: str | None = None
    task: str = ""
    """Whose row it is, where a source mixes tasks."""


@dataclass(frozen=True)
class Rows:
    """Rows that are read as they are asked for, each time anew.

    Attributes:
        read: reads them.
        identity: what tells them from other rows: files with their sizes and times, a dataset's fingerprint.
    """

    read: Callable[[], Iterator[Row]]
    identity: Sequence[str]

    def __iter__(self) -> Iterator[Row]:
        return self.read()


def value_of(row: Row, column: str) -> object:
    """A column's value.

    Raises: BadRowError: the row is unreadable, or the column is missing.
    """
    if row.problem is not None:
        raise BadRowError(row.problem)
    if column not in row.values:
        raise BadRowError(_missing(row, column))
    return row.values[column]


def text_of(row: Row, column: str) -> str:
    """A column's value as text, stripped; numbers and booleans become text.

    Raises: BadRowError: the row is unreadable, or the column is missing, empty, or not text.
    """
    text = as_text(value_of(row, column), column).strip()
    if not text:
        raise BadRowError(f"column {column!r} is empty")
    return text


def repeated_names(names: Sequence[str]) -> list[str]:
    """Names that stand there more than once."""
    return sorted({name for name in names if names.count(name) > 1})


def _missing(row: Row, column: str) -> str:
    hint = ""
    for key, values in row.values.items():
        if isinstance(values, list) and values and all(isinstance(v, dict) and column in v for v in values):
            hint = f"; the objects under {key!r} have it: expected an array of them alone, or one a line"
    return f"column {column!r} is missing; {suggest(column, map(str, row.values))}{hint}"


def as_text(value: object, column: str) -> str:
    """A value of a column as text; None becomes empty.

    Raises: BadRowError: the value is not text.
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float, Decimal)):
        if not isinstance(value, int) and not math.isfinite(value):
            raise BadRowError(f"column {column!r} holds {value}, expected text or a finite number")
        return str(value)
    if not isinstance(value, str):
        raise BadRowError(f"column {column!r} holds a {type(value).__name__}, expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRowError(f"column {column!r} is not valid Unicode: {error.reason}") from None
    return value
