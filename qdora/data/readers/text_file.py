"""The text of a file, with the line of the first byte that is not UTF-8."""

from __future__ import annotations

from pathlib import Path

from qdora.errors import DataError, InputError


def read_text(path: Path) -> str:
    """The whole file as UTF-8, a byte order mark removed.

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
    """The whole file.

    Raises: InputError: the file cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
