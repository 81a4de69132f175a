"""How a row of the user's own data holds a chat, or a question with its answer: named, or known by its keys.

A new format is a function from a row to its parts, and a row of `FORMATS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from qdora.config import ColumnsConfig, DatasetConfig, FormatName
from qdora.data.readers import RepeatedKey
from qdora.data.rows import BadRowError, Role, Row, Turn, as_text, last_answer, text_of, value_of
from qdora.errors import InputError, suggest
from qdora.tasks.base import instruction_of, question_of


class Parts(NamedTuple):
    """What an example is made of."""

    question: str
    completion: str
    turns: tuple[Turn, ...] = ()
    """Of a chat; then question and completion are texts of these."""


@dataclass(frozen=True, slots=True)
class Format:
    """One form of rows.

    Attributes:
        columns: by which it is known.
        holds: what they hold, for messages.
        parts: reads a row; raises BadRowError where it cannot be used.
    """

    columns: tuple[str, ...]
    holds: str
    parts: Callable[[Row, ColumnsConfig], Parts]


_ROLES: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
_KEYS = (("role", "content"), ("from", "value"))
# A turn that has one of these says more, or something else, than its text.
_OF_TURNS = (
    "tool_calls",
    "function_call",
    "tool_call_id",
    "reasoning_content",
    "reasoning",
    "thinking",
    "train",
)
_OF_CHATS = ("tools", "functions")
_OF_TEXTS = (*_OF_CHATS, "system", "history")
_TRAINED = {"0": False, "0.0": False, "1": True, "1.0": True}


def turns_of(row: Row, column: str) -> list[Turn]:
    """The turns of a chat in a column, white space at their ends removed.

    Raises: BadRowError: there are none, or one has an unknown role, no text, or more than text.
    """
    value = value_of(row, column)
    if not isinstance(value, list):
        raise BadRowError(f"column {column!r} holds a {type(value).__name__}, expected a list of turns")
    if not value:
        raise BadRowError(f"column {column!r} is empty, expected a list of turns")
    return [_turn(number, turn) for number, turn in enumerate(value, start=1)]


def _turn(number: int, turn: object) -> Turn:
    named = f"turn {number}"
    if isinstance(turn, RepeatedKey):
        raise BadRowError(f"{named}: the key {turn.key!r} repeats")
    if not isinstance(turn, dict):
        came = f"is a {type(turn).__name__}"
        raise BadRowError(f"{named} {came}, expected an object with role and content, or from and value")
    keys = next((keys for keys in _KEYS if turn.get(keys[0]) is not None), None)
    if keys is None or keys[1] not in turn:
        came = ", ".join(map(repr, turn)) or "no keys"
        raise BadRowError(f"{named} has {came}, expected role and content, or from and value")
    said = turn[keys[0]]
    role = _ROLES.get(said) if isinstance(said, str) else None
    if role is None:
        raise BadRowError(f"{named}: role {said!r}; {suggest(str(said), _ROLES)}")
    named = f"{named} ({said})"
    if more := [key for key in _OF_TURNS if turn.get(key)]:
        raise BadRowError(
            f"{named} has {', '.join(map(repr, more))}, which is not rendered here: only its text would be "
            f"trained. Write it into {keys[1]!r}, or remove it"
        )
    try:
        content = as_text(turn[keys[1]], keys[1]).strip()
    except BadRowError as error:
        raise BadRowError(f"{named}: {error}".replace("column", "key")) from None
    if not content:
        raise BadRowError(f"{named} is empty")
    weight = turn.get("weight")
    if weight is not None and str(weight) not in _TRAINED:
        raise BadRowError(f"{named}: weight {weight!r}; allowed: 0, which leaves the turn untrained, and 1")
    return Turn(role, content, weight is None or _TRAINED[str(weight)])


def chat_parts(turns: Sequence[Turn]) -> Parts:
    """The parts of a chat: what is answered last, and that answer.

    Raises: BadRowError: no assistant turn, or nothing that it answers.
    """
    if all(turn.role != "assistant" for turn in turns):
        raise BadRowError(f"no assistant turn among {len(turns)}, so there is nothing to train")
    last = last_answer(turns)
    before = [turn.content for turn in turns[:last] if turn.role != "system"]
    if not before:
        raise BadRowError("the chat begins with an assistant turn, which answers nothing")
    return Parts("\n\n".join(before), turns[last].content, tuple(turns))


def _refuse_more(row: Row, columns: Sequence[str]) -> None:
    for column in columns:
        if row.values.get(column):
            raise BadRowError(
                f"column {column!r} would not be rendered; write it into the turns of a chat, or remove it"
            )


def _chat(row: Row, column: str) -> Parts:
    turns = turns_of(row, column)
    _refuse_more(row, _OF_CHATS)
    if system := as_text(row.values.get("system"), "system").strip():
        if any(turn.role == "system" for turn in turns):
            raise BadRowError("both a column 'system' and a system turn; expected one of them")
        turns = [Turn("system", system), *turns]
    return chat_parts(turns)


def _question_answer(row: Row, columns: ColumnsConfig) -> Parts:
    return Parts(question_of(row, columns.question), text_of(row, columns.completion))


def _messages(row: Row, columns: ColumnsConfig) -> Parts:
    return _chat(row, columns.turns or "messages")


def _conversations(row: Row, columns: ColumnsConfig) -> Parts:
    return _chat(row, columns.turns or "conversations")


def _alpaca(row: Row, columns: ColumnsConfig) -> Parts:
    parts = Parts(instruction_of(row), text_of(row, "output"))
    _refuse_more(row, _OF_TEXTS)
    return parts


def _prompt_completion(row: Row, columns: ColumnsConfig) -> Parts:
    if isinstance(value_of(row, "prompt"), list):
        _refuse_more(row, _OF_CHATS)
        before = [turn._replace(trained=False) for turn in turns_of(row, "prompt")]
        return chat_parts([*before, *turns_of(row, "completion")])
    parts = Parts(text_of(row, "prompt"), text_of(row, "completion"))
    _refuse_more(row, _OF_TEXTS)
    return parts


FORMATS: Mapping[FormatName, Format] = {
    "question_answer": Format(("question", "answer"), "texts, or columns that you name", _question_answer),
    "messages": Format(("messages",), "a list of {role, content}", _messages),
    "conversations": Format(("conversations",), "a list of {from, value}", _conversations),
    "alpaca": Format(("instruction", "output"), "texts, and input where there is one", _alpaca),
    "prompt_completion": Format(("prompt", "completion"), "texts, or lists of turns", _prompt_completion),
}
"""In the order in which they are looked for."""


def check_format(config: DatasetConfig) -> None:
    """Check that format and columns go together.

    Raises: InputError: a column is named that the format does not have.
    """
    columns, renamed = config.columns, _renamed(config.columns)
    if renamed and config.format not in (None, "question_answer"):
        raise InputError(
            f"columns.{renamed[0]} belongs to format 'question_answer', not to {config.format!r}, whose "
            f"columns are {', '.join(FORMATS[config.format].columns)}"
        )
    if columns.turns and (renamed or config.format not in (None, "messages", "conversations")):
        other = f"format {config.format!r}" if config.format else f"columns.{renamed[0]}"
        raise InputError(f"columns.turns names a list of turns and does not go with {other}")


def recognize(config: DatasetConfig, rows: Sequence[Row]) -> FormatName:
    """The format that is named, or known by the columns of the first row that could be read.

    Raises: InputError: the columns are those of no format.
    """
    named = _named(config)
    if named is not None:
        return named
    first = next((row for row in rows if row.values), None)
    if first is None:
        return "question_answer"
    names = set(map(str, first.values))
    found = _known_by(names)
    if found is not None:
        return found
    if names & {"question", "answer"}:
        return "question_answer"  # then each row says what it lacks
    formats = "; ".join(f"{name}: {', '.join(f.columns)} ({f.holds})" for name, f in FORMATS.items())
    raise InputError(
        f"{config.path}: its columns {', '.join(map(repr, map(str, first.values)))} are of no format that is "
        f"known{_hint(first)}. Formats and what they need: {formats}. Rename columns, or name those of "
        "questions and answers: columns: {question: ..., completion: ...}"
    )


def _named(config: DatasetConfig) -> FormatName | None:
    """The format that a configuration names, or of which it names columns."""
    if config.format is None and config.columns.turns:
        return "messages"
    return "question_answer" if config.format is None and _renamed(config.columns) else config.format


def named_columns(config: DatasetConfig) -> list[str]:
    """The columns that must be there because the configuration says so; not those of a format yet unknown."""
    form, columns = _named(config), config.columns
    needed: list[str | None] = [columns.answer]
    if form == "question_answer":
        needed = [columns.question, columns.completion, columns.answer]
    elif form is not None:
        needed = [*((columns.turns,) if columns.turns else FORMATS[form].columns), columns.answer]
    return [column for column in needed if column]


def _renamed(columns: ColumnsConfig) -> list[str]:
    """The keys of question and completion that are not at their defaults."""
    defaults = ColumnsConfig()
    return [key for key in ("question", "completion") if getattr(columns, key) != getattr(defaults, key)]


def _known_by(names: set[str]) -> FormatName | None:
    return next((name for name, form in FORMATS.items() if names.issuperset(form.columns)), None)


def _hint(row: Row) -> str:
    for key, values in row.values.items():
        if not (isinstance(values, list) and values and all(isinstance(v, dict) for v in values)):
            continue
        inner = set.intersection(*(set(map(str, v)) for v in values))
        if any(inner.issuperset(keys) for keys in _KEYS):
            return f"; {key!r} holds turns: set columns: {{turns: {key}}}"
        if (found := _known_by(inner)) is not None:
            return (
                f"; the objects under {key!r} have those of {found}: expected an array of them alone, or one "
                "a line"
            )
    return ""
