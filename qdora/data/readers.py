"""Readers of json, jsonl, csv and parquet files: rows with their origin, one after the other.

Files with one value a line, CSV and Parquet are read as their rows are asked for; an array of JSON, or
objects over several lines, as one text.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import difflib
import gzip
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from qdora.data.columnar import read_parquet
from qdora.data.folders import COMPRESSED, data_files, has_splits, kind_of, split_files
from qdora.data.rows import Row, Rows, repeated_names
from qdora.errors import DataError, InputError, MissingPathError, suggest
from qdora.files import path_exists

_NAMES_SHOWN = 12


def stream_rows(path: Path, split: str | None = None, name: str | None = None) -> Rows:
    """The rows of a file, or of all files in a folder, which are of one kind, in the order of their names.

    Args:
        split: which files of a folder in the hub's layout are read, as `datasets` finds them; None: all.
        name: of a configuration of such a folder.
    Raises:
        InputError: the path does not exist, or holds no data file or several kinds, or no such split; as rows
            are read: it cannot be read.
        DataError: as rows are read: the file is not what its suffix says; names the line.
    """
    require(path, "a json, jsonl, csv or parquet file")
    files = [path]
    if path.is_dir():
        by_split = split is not None and has_splits(path, READERS)
        files = split_files(path, name, str(split)) if by_split else data_files(path, READERS)
    readers = {file: _reader(file) for file in files}
    return Rows(
        lambda: (row for file, reader in readers.items() for row in reader(file)),
        [part for file in files for part in file_identity(file)],
    )


def read_rows(path: Path) -> list[Row]:
    """All rows that `stream_rows` gives."""
    return list(stream_rows(path))


def file_identity(path: Path) -> list[str]:
    """Which file it is, and whether it was written since: its place, size and time; as `datasets` has it."""
    try:
        found = path.stat()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    return [str(path.resolve()), str(path), str(found.st_size), str(found.st_mtime_ns)]


def _reader(path: Path) -> Callable[[Path], Iterator[Row]]:
    kind = kind_of(path, READERS)
    if kind is None:
        raise InputError(
            f"{path}: unknown suffix {path.suffix!r}; {suggest(path.suffix, READERS)}; "
            f"all but .parquet also compressed: {', '.join(COMPRESSED)}"
        )
    return READERS[Path(kind).stem]


def require(path: Path, expected: str) -> None:
    """Check that a path exists.

    Raises: MissingPathError: it does not; names what was expected and what is there.
    """
    if not path_exists(path):
        raise MissingPathError(f"{path}: no such file or folder; expected {expected}; {_nearby(path)}")


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


_NOT_UTF8 = "not UTF-8 text"


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
        raise DataError(f"{path}:{line}: {_NOT_UTF8}: byte 0x{data[error.start]:02x}") from None


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
    except _UNREADABLE as error:
        raise _cannot_be_read(path, error) from None


# A truncated file is an EOFError for gzip, and a ValueError for bz2.
_UNREADABLE = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError)


def _cannot_be_read(path: Path, error: Exception) -> InputError:
    return InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}")


_OPEN: Mapping[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


def _lines(path: Path, *, text: bool = False) -> Iterator[Any]:
    """The lines of a file, with their ends, as bytes or as text; those of a compressed one decompressed.

    Bytes are split at \\n only: str.splitlines would also split at U+2028, which JSON allows in a string.

    Raises:
        InputError: the file cannot be read.
        DataError: text is not UTF-8; names the line.
    """
    how = {"mode": "rt", "encoding": "utf-8-sig", "newline": ""} if text else {"mode": "rb"}
    try:
        with _OPEN.get(path.suffix.lower(), Path.open)(path, **how) as file:
            yield from file
    except UnicodeDecodeError:
        read_text(path)  # which says where
        raise
    except _UNREADABLE as error:
        raise _cannot_be_read(path, error) from None


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
    return RepeatedKey(repeated_names([key for key, _ in pairs])[0])


# Numbers stay as the file spells them: 4.0 and 1e3 must reach the gold answer unchanged.
_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_float=str, parse_int=str, parse_constant=_refuse_constant
)


def read_json(path: Path) -> Iterator[Row]:
    """Objects in an array, one after the other over several lines, or one a line.

    Raises:
        InputError: the file cannot be read.
        DataError: not valid JSON, but for one object a line; names the line.  (Behind a syntax error
            rows cannot be recognized, so it stops whatever the configuration says.)
    """
    if _surely_one_a_line(_head(path)):
        return _json_lines(path, all_text=True)
    text = read_text(path)
    start = _skip_space(text, 0)
    if not text.startswith(("[", "{"), start):
        raise DataError(
            f"{path}:{_line_of(text, start)}: expected a JSON array of objects, or one object a line"
        )
    if _one_a_line(text[start:]):
        return _json_lines(path)
    return _values(text, start, path)


def read_json_lines(path: Path) -> Iterator[Row]:
    """One JSON object a line; blank lines are skipped, an unreadable line is a bad row.

    What begins as an array, or with an object over several lines, is read as by `read_json`.

    Raises:
        InputError: the file cannot be read.
        DataError: as `read_json`.
    """
    head = _head(path)
    if head[:1] not in ("{", "[") or _surely_one_a_line(head):
        return _json_lines(path)
    if _one_a_line(read_bytes(path).decode("utf-8-sig", errors="replace").lstrip(_BLANK)):
        return _json_lines(path)
    return read_json(path)


def _head(path: Path) -> str:
    """The first line that is not blank; empty where there is none."""
    for number, line in enumerate(_lines(path)):
        line = line if number else line.removeprefix(codecs.BOM_UTF8)
        if stripped := line.decode(errors="replace").strip(_BLANK):
            return str(stripped)
    return ""


def _surely_one_a_line(head: str) -> bool:
    """Whether the first line says that a file has one object a line; else its text does."""
    return head[:1] == "{" and head != "{" and _begins_with_value(head)


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


def _json_lines(path: Path, *, all_text: bool = False) -> Iterator[Row]:
    """A value a line; with `all_text` a line that is not UTF-8 is an error, not a bad row."""
    for number, line in enumerate(_lines(path), start=1):
        line = line if number > 1 else line.removeprefix(codecs.BOM_UTF8)
        if not line.strip():
            continue
        row = _parse_line(line.removesuffix(b"\n"), f"{path}:{number}")
        if all_text and row.problem is not None and row.problem.startswith(_NOT_UTF8):
            raise DataError(f"{row.origin}: {row.problem}")
        yield row


def _parse_line(line: bytes, origin: str) -> Row:
    try:
        return _json_row(_DECODER.decode(line.decode()), origin)
    except UnicodeDecodeError as error:
        return Row(origin, {}, f"{_NOT_UTF8}: byte 0x{line[error.start]:02x}")
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


def read_csv(path: Path) -> Iterator[Row]:
    """Records under a header; one with too few or too many fields, or the header again, is a bad row.

    Raises:
        InputError: the file cannot be read.
        DataError: it is not UTF-8, has no usable header, or a quote that swallows lines.
    """
    # The limit, which is the module's own, is there against an unclosed quote; `strict` finds that.
    limit = csv.field_size_limit(2**31 - 1)
    try:
        yield from _records(path)
    finally:
        csv.field_size_limit(limit)


def _records(path: Path) -> Iterator[Row]:
    # strict: an unclosed quote must not swallow the rest of the file unnoticed.
    reader = csv.reader(_lines(path, text=True), strict=True)
    header = _csv_header(reader, path)
    while True:
        line = reader.line_num + 1
        origin = f"{path}:{line}"
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if reader.line_num > line:
                raise DataError(
                    f"{origin}: not valid CSV: {error}; a quote that opens here takes in the lines up to "
                    f"{reader.line_num}, so their rows cannot be recognized"
                ) from None
            yield Row(origin, {}, f"not valid CSV: {error}")
            continue
        if [name.strip("\ufeff \t") for name in record] == header:
            yield Row(origin, {}, "the header line again, as of files put one behind the other")
        elif len(record) == len(header):
            yield Row(origin, dict(zip(header, record, strict=True)))
        elif record:  # a blank line is an empty record
            problem = f"{len(record)} fields, but the header names {len(header)} columns"
            yield Row(origin, {}, problem)


def _csv_header(reader: Iterator[list[str]], path: Path) -> list[str]:
    try:
        header = [name.strip() for name in next(reader, [])]
    except csv.Error as error:
        raise DataError(f"{path}:1: not valid CSV: {error}") from None
    if not any(header):
        raise DataError(f"{path}:1: no header line with the column names")
    if repeated := repeated_names(header):
        raise DataError(f"{path}:1: column names repeat: {', '.join(map(repr, repeated))}")
    return header


READERS: Mapping[str, Callable[[Path], Iterator[Row]]] = {
    ".parquet": read_parquet,
    ".jsonl": read_json_lines,
    ".json": read_json,
    ".csv": read_csv,
}
