"""A row as a file has it, and its columns as text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qdora.data.bad_rows import BadRowError
from qdora.errors import suggest


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a file or hub dataset; with a problem where it could not even be read."""

    origin: str
    values: Mapping[str, object]
    problem: str | None = None


def text_of(row: Row, column: str) -> str:
    """A column's value as text, stripped; numbers and booleans become text.

    Raises: BadRowError: the row is unreadable, or the column is missing, empty, or not text.
    """
    if row.problem is not None:
        raise BadRowError(row.problem)
    if column not in row.values:
        raise BadRowError(f"column {column!r} is missing; {suggest(column, map(str, row.values))}")
    text = _as_text(row.values[column], column).strip()
    if not text:
        raise BadRowError(f"column {column!r} is empty")
    return text


def optional_text_of(row: Row, column: str) -> str:
    """As `text_of`, but empty where the column is missing or empty.

    Raises: BadRowError: the column is not text.
    """
    return _as_text(row.values.get(column), column).strip()


def _as_text(value: object, column: str) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return str(value)
    if not isinstance(value, str):
        raise BadRowError(f"column {column!r} holds a {type(value).__name__}, expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRowError(f"column {column!r} is not valid Unicode: {error.reason}") from None
    return value
