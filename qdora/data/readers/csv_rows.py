"""CSV with a header line, with the line on which each record starts."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from qdora.data.readers.text_file import read_text
from qdora.data.rows import Row
from qdora.errors import DataError


def read_csv(path: Path) -> list[Row]:
    """Records under a header; one with too few or too many fields is a bad row.

    Raises:
        InputError: the file cannot be read.
        DataError: it is not UTF-8, or has no usable header.
    """
    # strict: an unclosed quote must not swallow the rest of the file unnoticed.
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    header = _header(reader, path)
    rows: list[Row] = []
    while True:
        origin = f"{path}:{reader.line_num + 1}"
        try:
            record = next(reader)
        except StopIteration:
            return rows
        except csv.Error as error:
            rows.append(Row(origin, {}, f"not valid CSV: {error}"))
            continue
        if record:  # a blank line is an empty record
            rows.append(_row(record, header, origin))


def _header(reader: Iterator[list[str]], path: Path) -> list[str]:
    try:
        header = [name.strip() for name in next(reader, [])]
    except csv.Error as error:
        raise DataError(f"{path}:1: not valid CSV: {error}") from None
    if not any(header):
        raise DataError(f"{path}:1: no header line with the column names")
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise DataError(f"{path}:1: column names repeat: {', '.join(map(repr, repeated))}")
    return header


def _row(record: Sequence[str], header: Sequence[str], origin: str) -> Row:
    if len(record) != len(header):
        return Row(origin, {}, f"{len(record)} fields, but the header names {len(header)} columns")
    return Row(origin, dict(zip(header, record, strict=True)))
