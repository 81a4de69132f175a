"""Readers of json, jsonl, csv and parquet files and of hub datasets: rows with their origin."""

from __future__ import annotations

import bz2
import codecs
import csv
import difflib
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from qdora.data.folders import COMPRESSED, data_files, kind_of
from qdora.data.rows import Row
from qdora.errors import DataError, InputError, suggest
from qdora.files import path_exists

_NAMES_SHOWN = 12


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, or of all files in a folder, which are of one kind, in the order of their names.

    Raises:
        InputError: the path does not exist, cannot be read, or holds no data file or several kinds.
        DataError: the file is not what its suffix says; names the line.
    """
    require(path, "a json, jsonl, csv or parquet file")
    if path.is_dir():
        return [row for file in data_files(path, READERS) for row in read_rows(file)]
    kind = kind_of(path, READERS)
    if kind is None:
        raise InputError(
            f"{path}: unknown suffix {path.suffix!r}; {suggest(path.suffix, READERS)}; "
            f"all but .parquet also compressed: {', '.join(COMPRESSED)}"
        )
    return READERS[Path(kind).stem](path)


def require(path: Path, expected: str) -> None:
    """Check that a path exists.

    Raises: InputError: it does not; names what was expected and what is there.
    """
    if not path_exists(path):
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


_DECOMPRESS: Mapping[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
    ".xz": lzma.decompress,
}


def read_bytes(path: Path) -> bytes:
    """A file's bytes, those of a compressed one decompressed.

    Raises: InputError: the file cannot be read.
    """
    try:
        return _DECOMPRESS.get(path.suffix.lower(), bytes)(path.read_bytes())
    # A truncated file is an EOFError for gzip, and a ValueError for bz2.
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


_BLANK = " \t\r\n"
_SPACE = re.compile(f"[{_BLANK}]*")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


@dataclass(frozen=True, slots=True)
class RepeatedKey:
    """Stands for an object that has a key twice, of which a dict would keep the last."""

    key: str


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | RepeatedKey:
    values = dict(pairs)
    if len(values) == len(pairs):
        return values
    return RepeatedKey(_repeated([key for key, _ in pairs])[0])


def _repeated(names: Sequence[str]) -> list[str]:
    return sorted({name for name in names if names.count(name) > 1})


# Numbers stay as the file spells them: 4.0 and 1e3 must reach the gold answer unchanged.
_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_float=str, parse_int=str, parse_constant=_refuse_constant
)


def read_json(path: Path) -> list[Row]:
    """Objects in an array, one after the other over several lines, or one a line.

    Raises:
        InputError: the file cannot be read.
        DataError: not valid JSON, but for one object a line; names the line.  (Behind a syntax error
            rows cannot be recognized, so it stops whatever the configuration says.)
    """
    text = read_text(path)
    start = _skip_space(text, 0)
    if not text.startswith(("[", "{"), start):
        raise DataError(
            f"{path}:{_line_of(text, start)}: expected a JSON array of objects, or one object a line"
        )
    if _one_a_line(text[start:]):
        return _lines(read_bytes(path), path)
    return list(_values(text, start, path))


def read_json_lines(path: Path) -> list[Row]:
    """One JSON object a line; blank lines are skipped, an unreadable line is a bad row.

    What begins as an array, or with an object over several lines, is read as by `read_json`.

    Raises:
        InputError: the file cannot be read.
        DataError: as `read_json`.
    """
    data = read_bytes(path)
    if _one_a_line(data.decode("utf-8-sig", errors="replace").lstrip(_BLANK)):
        return _lines(data, path)
    return read_json(path)


def _one_a_line(text: str) -> bool:
    """Whether a text that begins with its first value has one value a line."""
    first = text.partition("\n")[0].strip(_BLANK)
    if text[:1] != "{" or first == "{":
        return text[:1] not in ("{", "[")
    return _begins_with_value(first) or not _begins_with_value(text)


def _begins_with_value(text: str) -> bool:
    try:
        _DECODER.raw_decode(text)
    except (ValueError, RecursionError):
        return False
    return True


def _lines(data: bytes, path: Path) -> list[Row]:
    # Split bytes at \n only: str.splitlines would also split at U+2028, which JSON allows in a string.
    lines = data.removeprefix(codecs.BOM_UTF8).split(b"\n")
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


def _values(text: str, start: int, path: Path) -> Iterator[Row]:
    """The elements of an array, or the objects up to the end of the text.

    Each has an origin of its own: its line, and its index where another one begins on the same line.
    """
    in_array = text[start] == "["
    end = "]" if in_array else ""
    position = _skip_space(text, start + in_array)
    separator = text[position : position + 1]
    line, counted, index = 1, 0, 0
    while separator != end:
        lines, counted = text.count("\n", counted, position), position
        line, beside = line + lines, f"[{index}]" if index and not lines else ""
        try:
            value, position = _DECODER.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            at = error.lineno if isinstance(error, json.JSONDecodeError) else line
            raise DataError(f"{path}:{at}: {_syntax_error(error)}") from None
        yield _json_row(value, f"{path}:{line}{beside}")
        index += 1
        position = _skip_space(text, position)
        separator = text[position : position + 1]
        if in_array and separator == ",":
            position = _skip_space(text, position + 1)
        elif in_array and separator != "]":
            raise DataError(f"{path}:{_line_of(text, position)}: not valid JSON: expected ',' or ']'")
    position = _skip_space(text, position + 1)
    if position != len(text):
        raise DataError(f"{path}:{_line_of(text, position)}: not valid JSON: text behind the array")


def _json_row(value: object, origin: str) -> Row:
    if isinstance(value, dict):
        return Row(origin, value)
    if isinstance(value, RepeatedKey):
        return Row(origin, {}, f"the key {value.key!r} repeats")
    return Row(origin, {}, f"expected a JSON object, got {type(value).__name__}")


def _skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match is not None  # the pattern matches the empty string
    return match.end()


def _line_of(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def read_csv(path: Path) -> list[Row]:
    """Records under a header; one with too few or too many fields, or the header again, is a bad row.

    Raises:
        InputError: the file cannot be read.
        DataError: it is not UTF-8, has no usable header, or a quote that swallows lines.
    """
    text = read_text(path)
    # The limit, which is the module's own, is there against an unclosed quote; `strict` finds that.
    limit = csv.field_size_limit(len(text) + 1)
    try:
        return _records(text, path)
    finally:
        csv.field_size_limit(limit)


def _records(text: str, path: Path) -> list[Row]:
    # strict: an unclosed quote must not swallow the rest of the file unnoticed.
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header = _csv_header(reader, path)
    rows: list[Row] = []
    while True:
        line = reader.line_num + 1
        origin = f"{path}:{line}"
        try:
            record = next(reader)
        except StopIteration:
            return rows
        except csv.Error as error:
            if reader.line_num > line:
                raise DataError(
                    f"{origin}: not valid CSV: {error}; a quote that opens here takes in the lines up to "
                    f"{reader.line_num}, so their rows cannot be recognized"
                ) from None
            rows.append(Row(origin, {}, f"not valid CSV: {error}"))
            continue
        if [name.strip("\ufeff \t") for name in record] == header:
            rows.append(Row(origin, {}, "the header line again, as of files put one behind the other"))
        elif len(record) == len(header):
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
    if repeated := _repeated(header):
        raise DataError(f"{path}:1: column names repeat: {', '.join(map(repr, repeated))}")
    return header


def read_parquet(path: Path) -> list[Row]:
    """All rows of a Parquet file.

    Raises:
        InputError: the file cannot be read as Parquet.
        DataError: two columns have the same name.
    """
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        # ParquetFile, unlike read_table, does not invent columns from folder names like split=train.
        with pq.ParquetFile(path) as file:
            if repeated := _repeated(file.schema_arrow.names):
                raise DataError(f"{path}: column names repeat: {', '.join(map(repr, repeated))}")
            rows = _table_rows(file.read())
    except DataError:
        raise
    # ValueError and OverflowError: text that is not UTF-8, a date that Python does not have.
    except (OSError, ValueError, OverflowError, pa.ArrowException) as error:
        raise InputError(f"{path}: cannot be read as Parquet: {error}") from None
    return [Row(f"{path}[{i}]", values) for i, values in enumerate(rows)]


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
    require_columns(where, columns, table.column_names)
    rows = _table_rows(table.with_format("arrow")[:])
    return [Row(f"{dataset_id}[{i}]", values) for i, values in enumerate(rows)]


def require_columns(where: str, needed: Sequence[str], names: Sequence[str]) -> None:
    """Raises: InputError: a hub dataset has not all columns that are needed."""
    for column in needed:
        if column not in names:
            raise InputError(f"hub dataset {where}: no column {column!r}; {suggest(column, names)}")


READERS: Mapping[str, Callable[[Path], list[Row]]] = {
    ".parquet": read_parquet,
    ".jsonl": read_json_lines,
    ".json": read_json,
    ".csv": read_csv,
}
