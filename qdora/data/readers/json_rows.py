"""JSON arrays of objects and JSON Lines, with the line on which each object starts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from qdora.data.readers.text_file import read_bytes, read_text
from qdora.data.rows import Row
from qdora.errors import DataError

_SPACE = re.compile(r"[ \t\r\n]*")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


# Numbers stay as the file spells them: 4.0 and 1e3 must reach the gold answer unchanged.
_DECODER = json.JSONDecoder(parse_float=str, parse_int=str, parse_constant=_refuse_constant)


def read_json(path: Path) -> list[Row]:
    """A JSON array of objects, or JSON Lines where the file starts with `{`.

    Raises:
        InputError: the file cannot be read.
        DataError: an array that is not valid JSON; names the line.  (Behind a syntax error in
            an array nothing can be told apart, so it stops whatever the configuration says.)
    """
    text = read_text(path)
    start = _skip_space(text, 0)
    if text[start : start + 1] == "{":
        return read_json_lines(path)
    if text[start : start + 1] != "[":
        raise DataError(
            f"{path}:{_line(text, start)}: expected a JSON array of objects, or one object a line"
        )
    return list(_elements(text, start, path))


def read_json_lines(path: Path) -> list[Row]:
    """One JSON object a line; blank lines are passed over, an unreadable line is a bad row.

    Raises: InputError: the file cannot be read.
    """
    # Split bytes at \n only: str.splitlines would also split at U+2028, which JSON allows in a string.
    lines = read_bytes(path).removeprefix(_BYTE_ORDER_MARK).split(b"\n")
    return [_parse_line(line, f"{path}:{i}") for i, line in enumerate(lines, start=1) if line.strip()]


def _parse_line(line: bytes, origin: str) -> Row:
    try:
        return _row(_DECODER.decode(line.decode()), origin)
    except json.JSONDecodeError as error:
        return Row(origin, {}, f"not valid JSON: {error.msg} at column {error.colno}")
    except UnicodeDecodeError as error:
        return Row(origin, {}, f"not UTF-8 text: byte 0x{line[error.start]:02x}")
    except (ValueError, RecursionError) as error:
        return Row(origin, {}, f"not valid JSON: {error}")


def _elements(text: str, start: int, path: Path) -> Iterator[Row]:
    position = _skip_space(text, start + 1)
    line, counted = 1, 0
    if text[position : position + 1] == "]":
        return _expect_end(text, position + 1, path)
    while True:
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, position = _DECODER.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}:{error.lineno}: not valid JSON: {error.msg} at column {error.colno}"
            ) from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{line}: not valid JSON: {error}") from None
        yield _row(value, f"{path}:{line}")
        position = _skip_space(text, position)
        separator = text[position : position + 1]
        if separator == "]":
            return _expect_end(text, position + 1, path)
        if separator != ",":
            raise DataError(f"{path}:{_line(text, position)}: not valid JSON: expected ',' or ']'")
        position = _skip_space(text, position + 1)


def _expect_end(text: str, position: int, path: Path) -> None:
    position = _skip_space(text, position)
    if position != len(text):
        raise DataError(f"{path}:{_line(text, position)}: not valid JSON: text behind the array")


def _row(value: object, origin: str) -> Row:
    if isinstance(value, dict):
        return Row(origin, value)
    return Row(origin, {}, f"expected a JSON object, got {type(value).__name__}")


def _skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match is not None  # the pattern matches the empty string
    return match.end()


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1
