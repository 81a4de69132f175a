"""Files that are either written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from qdora.errors import InputError

_REPLACED = ".replaced"


def write_file(path: Path, write: Callable[[Path], None]) -> None:
    """Write under a temporary name in the same folder, flush to the device, rename.

    Args:
        path: the final name; its folder is made where missing.
        write: writes the file at the path it is given.
    Raises: InputError: the device is full, or the folder cannot be written; `path` is as before.
    """
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            write(temporary)
            temporary.chmod(0o644)
            flush(temporary)
            temporary.replace(path)
            flush(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, the same bytes for the same contents.

    The library writes metadata in an order that changes from call to call.
    """
    save_file(dict(tensors), path, dict(metadata))
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(metadata.items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(ordered) <= length, "the same header, in another order"
        file.seek(8)
        file.write(ordered.ljust(length))


def write_text(path: Path, text: str) -> None:
    """Write text as `write_file` does."""
    write_file(path, lambda temporary: _write_text(temporary, text))


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON as `write_file` does."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """A JSON file's value.

    Raises: InputError: missing, unreadable or not JSON; the file is named.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not readable as JSON: {error}") from None


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Fill a temporary sibling folder; flushed and renamed to `path` if the block succeeds.

    A folder that stood at `path` is replaced only then.

    Raises: InputError: the device is full, or the folder cannot be written; nothing is left behind.
    """
    with explained(path):
        temporary = temporary_directory(path)
        try:
            yield temporary
            put_directory(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def temporary_directory(path: Path) -> Path:
    """A new hidden folder beside `path`, for `put_directory`; the folder around them is made where missing.

    Raises: InputError: the folder cannot be written.
    """
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))


def put_directory(temporary: Path, path: Path) -> None:
    """Flush a filled temporary folder and rename it to `path`; what stood there is replaced.

    Raises: InputError: the device is full, or the folder cannot be written; `path` is as before.
    """
    with explained(path):
        for file in [*temporary.rglob("*"), temporary]:
            # Temporary files are private; what they become is as readable as any other file.
            file.chmod(0o755 if file.is_dir() else 0o644)
            flush(file)
        _swap(temporary, path, temporary.with_name(temporary.name + _REPLACED))
        flush(path.parent)


def clear_leftovers(folder: Path, name: str) -> None:
    """Remove the temporary folders of a process that was killed while it wrote to `folder`.

    Where it was killed between the two renames that replace a folder, the old one is put back.

    Args:
        name: pattern of the folders that were written.
    Raises: InputError: the folder cannot be written.
    """
    with explained(folder):
        for left in sorted(folder.glob(f".{name}.*")):
            path = folder / left.name.removesuffix(_REPLACED)[1:].rpartition(".")[0]
            if left.name.endswith(_REPLACED) and not os.path.lexists(path):
                left.rename(path)
            else:
                shutil.rmtree(left)


def _swap(new: Path, path: Path, replaced: Path) -> None:
    """Put `new` at `path`; what stood there is put back if that fails, and removed if it does not."""
    try:
        if os.path.lexists(path):
            path.rename(replaced)
        new.rename(path)
    except BaseException:
        if os.path.lexists(replaced) and not os.path.lexists(path):
            replaced.rename(path)
        raise
    if replaced.is_dir() and not replaced.is_symlink():
        shutil.rmtree(replaced)
    else:
        replaced.unlink(missing_ok=True)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Until the device has a file's contents, or a folder's names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Say of a refusal of the operating system what could not be written.

    Raises: InputError: the block was refused.
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error
    except Exception as error:
        # safetensors reports the operating system's refusals as an exception of its own.
        if "SafetensorError" in type(error).__name__ and "os error" in str(error).lower():
            raise InputError(f"{path}: cannot be written: {error}") from error
        raise
