"""The reader for a path: by its suffix; a folder is read file by file."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from pathlib import Path

from qdora.data.readers.csv_rows import read_csv
from qdora.data.readers.json_rows import read_json, read_json_lines
from qdora.data.readers.parquet_rows import read_parquet
from qdora.data.rows import Row
from qdora.errors import InputError, suggest

READERS: Mapping[str, Callable[[Path], list[Row]]] = {
    ".parquet": read_parquet,
    ".jsonl": read_json_lines,
    ".json": read_json,
    ".csv": read_csv,
}

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
    if path.exists():
        return
    raise InputError(f"{path}: no such file or folder; expected {expected}; {_nearby(path)}")


def _nearby(path: Path) -> str:
    """What stands where the path was expected; the folder may be large, so only the nearest names."""
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
