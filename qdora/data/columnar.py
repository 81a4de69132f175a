"""Readers of tables: Parquet files and datasets of the hub."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from qdora.data.rows import Row, Rows, repeated_names
from qdora.errors import DataError, InputError, suggest

ROWS_AT_ONCE = 1_000
"""Rows of a table that are objects at the same time."""


def read_parquet(path: Path) -> Iterator[Row]:
    """All rows of a Parquet file.

    Raises:
        InputError: the file cannot be read as Parquet.
        DataError: two columns have the same name.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # ParquetFile, unlike read_table, does not invent columns from folder names like split=train.
        with pq.ParquetFile(path) as file:
            if repeated := repeated_names(file.schema_arrow.names):
                raise DataError(f"{path}: column names repeat: {', '.join(map(repr, repeated))}")
            count = 0
            for batch in file.iter_batches(ROWS_AT_ONCE):
                rows = _table_rows(pa.Table.from_batches([batch]))
                yield from (Row(f"{path}[{i}]", values) for i, values in enumerate(rows, start=count))
                count += len(rows)
    except DataError:
        raise
    # ValueError and OverflowError: text that is not UTF-8, a date that Python does not have.
    except (OSError, ValueError, OverflowError, pa.ArrowException) as error:
        raise InputError(f"{path}: cannot be read as Parquet: {error}") from None


def _table_rows(table: Any) -> list[dict[str, Any]]:
    """The rows of an Arrow table; 0.1 as a 32-bit float is 0.1 in 64 bits, not 0.10000000149011612."""
    rows: list[dict[str, Any]] = table.to_pylist()
    short = {"float": np.float32, "halffloat": np.float16}
    for field in table.schema:
        if kind := short.get(str(field.type)):
            for row in rows:
                if row[field.name] is not None:
                    row[field.name] = float(str(kind(row[field.name])))
    return rows


def read_hub(
    dataset_id: str, name: str | None, split: str, columns: Sequence[str], *, streaming: bool = False
) -> Rows:
    """The rows of one split, in the hub's order.

    Args:
        dataset_id: for example `openai/gsm8k`; with `streaming` also a folder in the hub's layout.
        name: configuration of the dataset, where it has several.
        split: the hub's split name.
        columns: the columns that must be there.
        streaming: read them from the hub as they are asked for; else all are downloaded first.
    Raises: InputError: the hub cannot be reached, the dataset, configuration, split or a column
        does not exist, or access is not granted; with `streaming` also as rows are read.
    """
    import datasets

    where = f"{dataset_id}{f' ({name})' if name else ''}, split {split!r}"
    try:
        table = datasets.load_dataset(
            dataset_id, name, split=split, **({"streaming": True} if streaming else {})
        )
    # The library and its transport raise errors without a common base; none of them is our bug.
    except Exception as error:
        raise InputError(
            f"hub dataset {where}: cannot be loaded: {_reason(error)}. Check the id, the configuration and "
            "the split, that this machine reaches the hub, and for a gated dataset that you are logged in; "
            "a downloaded copy can be read with a local path instead"
        ) from error
    if table.column_names is not None:  # of a stream they may be unknown before the first row
        require_columns(where, columns, table.column_names)
    arrow = table.with_format("arrow")

    def read() -> Iterator[Row]:
        starts = count(0, ROWS_AT_ONCE)
        for start, part in zip(starts, _parts(arrow, where, streaming=streaming), strict=False):
            yield from (Row(f"{dataset_id}[{i}]", v) for i, v in enumerate(_table_rows(part), start=start))

    return Rows(read, [dataset_id, str(name), split] if streaming else [dataset_id, table._fingerprint])


def _parts(arrow: Any, where: str, *, streaming: bool) -> Iterator[Any]:
    """The rows of a dataset as Arrow tables of `ROWS_AT_ONCE`."""
    if not streaming:
        yield from (arrow[start : start + ROWS_AT_ONCE] for start in range(0, len(arrow), ROWS_AT_ONCE))
        return
    try:
        yield from arrow.iter(ROWS_AT_ONCE)
    except Exception as error:  # as above
        raise InputError(
            f"hub dataset {where}: cannot be read on: {_reason(error)}. A run goes on from its last "
            "checkpoint with --resume"
        ) from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def require_columns(where: str, needed: Sequence[str], names: Sequence[str]) -> None:
    """Raises: InputError: a hub dataset has not all columns that are needed."""
    for column in needed:
        if column not in names:
            raise InputError(f"hub dataset {where}: no column {column!r}; {suggest(column, names)}")
