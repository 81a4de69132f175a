"""From a source's rows to its examples: convert, settle bad rows, order, limit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from qdora.data.rows import BadRowError, BadRows, Dataset, Example, Row, Skipped, fingerprint, settle
from qdora.errors import InputError

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


def shuffled(count: int, seed: int) -> list[int]:
    """The order into which `datasets.Dataset.shuffle(seed)` brings `count` rows."""
    return [int(i) for i in np.random.default_rng(seed).permutation(count)]


def file_order_for_test(count: int, split: str, seed: int) -> list[int]:
    """Published train and test files: train is shuffled, test keeps its order."""
    return shuffled(count, seed) if split == "train" else list(range(count))


def held_out_split(count: int, split: str, held_out: int, seed: int, where: str) -> list[int]:
    """The shuffled rows; with `held_out`, `test` is the last so many of them and `train` the others.

    Args:
        where: names the data in errors.
    Raises: InputError: `held_out` is not smaller than the number of rows, or the split is neither
        `train` nor `test`.
    """
    order = shuffled(count, seed)
    if held_out == 0:
        return order
    if held_out >= count:
        raise InputError(f"{where}: held_out {held_out} leaves nothing to train on; there are {count} rows")
    if split not in ("train", "test"):
        raise InputError(f"{where}: split {split!r} with held_out {held_out}; allowed: train, test")
    return order[-held_out:] if split == "test" else order[:-held_out]
