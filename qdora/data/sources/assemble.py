"""From a source's rows to its examples: convert, settle bad rows, order, limit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qdora.data.bad_rows import BadRowError, BadRows, settle
from qdora.data.example import Dataset, Example, Skipped, fingerprint
from qdora.data.rows import Row

Recipe = Callable[[Row], Example]
"""Makes an example of a row; raises `BadRowError` where it cannot."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A row, and how it becomes an example."""

    row: Row
    recipe: Recipe


@dataclass(frozen=True, slots=True)
class Selection:
    """The rows of a source as they stand in its files, and which of them are used, in which order."""

    candidates: Sequence[Candidate]
    order: Sequence[int]


def candidates(rows: Sequence[Row], recipe: Recipe) -> list[Candidate]:
    """Rows that all become examples in the same way."""
    return [Candidate(row, recipe) for row in rows]


def assemble(selection: Selection, limit: int | None, bad_rows: BadRows) -> Dataset:
    """Convert the selected rows; the first `limit` usable ones in the selection's order.

    All selected rows are checked, also those behind the limit, in the order of the file: a bad
    row shows before the first long run, and the first one named is the first in the file.

    Raises: DataError: a row is bad, and `bad_rows` is `stop`.
    """
    converted: dict[int, Example] = {}
    skipped: list[Skipped] = []
    for i in sorted(selection.order):
        candidate = selection.candidates[i]
        try:
            converted[i] = candidate.recipe(candidate.row)
        except BadRowError as error:
            skipped.append(Skipped(candidate.row.origin, str(error)))
    settle(skipped, bad_rows)
    examples = [converted[i] for i in selection.order if i in converted][:limit]
    return Dataset(examples, skipped, fingerprint(examples))
