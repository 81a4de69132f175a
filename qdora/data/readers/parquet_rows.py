"""Parquet, each row named by its index."""

from __future__ import annotations

from pathlib import Path

from qdora.data.rows import Row
from qdora.errors import InputError


def read_parquet(path: Path) -> list[Row]:
    """All rows of a Parquet file.

    Raises: InputError: the file cannot be read as Parquet.
    """
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        # ParquetFile, unlike read_table, does not invent columns from folder names like split=train.
        with pq.ParquetFile(path) as file:
            rows = file.read().to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path}: cannot be read as Parquet: {error}") from None
    return [Row(f"{path}[{i}]", values) for i, values in enumerate(rows)]
