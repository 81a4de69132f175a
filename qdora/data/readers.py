"""Readers of json, jsonl, csv and parquet files and of hub datasets: rows with their origin."""

from __future__ import annotations

import codecs
import csv
import difflib
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from qdora.data.rows import Row
from qdora.errors import DataError, InputError, suggest

_NAMES_SHOWN = 12


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, or of all files of one kind in a folder, in the order of their names.

    Raises:
        InputError: the path does not exist, cannot be read, or holds no data file.
        DataError: the file is not what its suffix says; names the line.
    """
    require(path, "a json, jsonl, csv or parquet file")
    if path.is_dir():
        return [row for file in _data_files(path) for row in read_rows(file)]
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path}: unknown suffix {path.suffix!r}; {suggest(path.suffix, READERS)}")
    return reader(path)


def require(path: Path, expected: str) -> None:
    """Check that a path exists.

    Raises: InputError: it does not; names what was expected and what is there.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; expected {expected}; {_nearby(path)}")


def _nearby(path: Path) -> str:
    """What is in the folder where the path was expected, or the nearest names."""
    if not path.parent.is_dir():
        return f"there is no folder {path.parent} either"
    names = sorted(entry.name for entry in path.parent.iterdir() if not entry.name.startswith("."))
    if not names:
        return f"{path.parent} is empty"
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(map(repr, near))}?"
    shown = ", ".join(names[:_NAMES_SHOWN]) + (", ..." if len(names) > _NAMES_SHOWN else "")
    return f"{path.parent} holds: {shown}"


def _data_files(folder: Path) -> list[Path]:
    """The files of the first kind that the folder has: a Parquet dataset often brings JSON metadata."""
    for suffix in READERS:
        files = sorted(file for file in folder.rglob(f"*{suffix}") if file.is_file())
        if files:
            return files
    raise InputError(f"{folder}: no data file in this folder; expected one of: {', '.join(READERS)}")


def read_text(path: Path) -> str:
    """A file's text as UTF-8, a byte order mark removed.

    Raises:
        InputError: the file cannot be read.
        DataError: it is not UTF-8; names the line.
    """
    data = read_bytes(path)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8 text: byte 0x{data[error.start]:02x}") from None


def read_bytes(path: Path) -> bytes:
    """A file's bytes.

    Raises: InputError: the file cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None


_SPACE = re.compile(r"[ \t\r\n]*")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


# Numbers stay as the file spells them: 4.0 and 1e3 must reach the gold answer unchanged.
_DECODER = json.JSONDecoder(parse_float=str, parse_int=str, parse_constant=_refuse_constant)


def read_json(path: Path) -> list[Row]:
    """A JSON array of objects, or JSON Lines where the file starts with `{`.

    Raises:
        InputError: the file cannot be read.
        DataError: an array that is not valid JSON; names the line.  (Behind a syntax error in an array
            rows cannot be recognized, so it stops whatever the configuration says.)
    """
    text = read_text(path)
    start = _skip_space(text, 0)
    if text.startswith("{", start):
        return read_json_lines(path)
    if not text.startswith("[", start):
        raise DataError(
            f"{path}:{_line_of(text, start)}: expected a JSON array of objects, or one object a line"
        )
    return list(_elements(text, start, path))


def read_json_lines(path: Path) -> list[Row]:
    """One JSON object a line; blank lines are skipped, an unreadable line is a bad row.

    Raises: InputError: the file cannot be read.
    """
    # Split bytes at \n only: str.splitlines would also split at U+2028, which JSON allows in a string.
    lines = read_bytes(path).removeprefix(codecs.BOM_UTF8).split(b"\n")
    return [_parse_line(line, f"{path}:{i}") for i, line in enumerate(lines, start=1) if line.strip()]


def _parse_line(line: bytes, origin: str) -> Row:
    try:
        return _json_row(_DECODER.decode(line.decode()), origin)
    except UnicodeDecodeError as error:
        return Row(origin, {}, f"not UTF-8 text: byte 0x{line[error.start]:02x}")
    except (ValueError, RecursionError) as error:
        return Row(origin, {}, _syntax_error(error))


def _syntax_error(error: ValueError | RecursionError) -> str:
    column = isinstance(error, json.JSONDecodeError) and f"{error.msg} at column {error.colno}"
    return f"not valid JSON: {column or error}"


def _elements(text: str, start: int, path: Path) -> Iterator[Row]:
    position = _skip_space(text, start + 1)
    separator = text[position : position + 1]
    line, counted = 1, 0
    while separator != "]":
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, position = _DECODER.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            at = error.lineno if isinstance(error, json.JSONDecodeError) else line
            raise DataError(f"{path}:{at}: {_syntax_error(error)}") from None
        yield _json_row(value, f"{path}:{line}")
        position = _skip_space(text, position)
        separator = text[position : position + 1]
        if separator == ",":
            position = _skip_space(text, position + 1)
        elif separator != "]":
            raise DataError(f"{path}:{_line_of(text, position)}: not valid JSON: expected ',' or ']'")
    position = _skip_space(text, position + 1)
    if position != len(text):
        raise DataError(f"{path}:{_line_of(text, position)}: not valid JSON: text behind the array")


def _json_row(value: object, origin: str) -> Row:
    if isinstance(value, dict):
        return Row(origin, value)
    return Row(origin, {}, f"expected a JSON object, got {type(value).__name__}")


def _skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match is not None  # the pattern matches the empty string
    return match.end()


def _line_of(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def read_csv(path: Path) -> list[Row]:
    """Records under a header; one with too few or too many fields is a bad row.

    Raises:
        InputError: the file cannot be read.
        DataError: it is not UTF-8, or has no usable header.
    """
    # strict: an unclosed quote must not swallow the rest of the file unnoticed.
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    header = _csv_header(reader, path)
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
        if len(record) == len(header):
            rows.append(Row(origin, dict(zip(header, record, strict=True))))
        elif record:  # a blank line is an empty record
            problem = f"{len(record)} fields, but the header names {len(header)} columns"
            rows.append(Row(origin, {}, problem))


def _csv_header(reader: Iterator[list[str]], path: Path) -> list[str]:
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


def read_hub(dataset_id: str, name: str | None, split: str, columns: Sequence[str]) -> list[Row]:
    """The rows of one split, in the hub's order.

    Args:
        dataset_id: for example `openai/gsm8k`.
        name: configuration of the dataset, where it has several.
        split: the hub's split name.
        columns: the columns that must be there.
    Raises: InputError: the hub cannot be reached, the dataset, configuration, split or a column
        does not exist, or access is not granted.
    """
    import datasets

    where = f"{dataset_id}{f' ({name})' if name else ''}, split {split!r}"
    try:
        table = datasets.load_dataset(dataset_id, name, split=split)
    # The library and its transport raise errors without a common base; none of them is our bug.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"hub dataset {where}: cannot be loaded: {reason}. Check the id, the configuration and the "
            "split, that this machine reaches the hub, and for a gated dataset that you are logged in; "
            "a downloaded copy can be read with a local path instead"
        ) from error
    for column in columns:
        if column not in table.column_names:
            raise InputError(
                f"hub dataset {where}: no column {column!r}; {suggest(column, table.column_names)}"
            )
    return [Row(f"{dataset_id}[{i}]", values) for i, values in enumerate(table)]


READERS: Mapping[str, Callable[[Path], list[Row]]] = {
    ".parquet": read_parquet,
    ".jsonl": read_json_lines,
    ".json": read_json,
    ".csv": read_csv,
}
