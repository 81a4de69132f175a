"""Atomic writes: a file or a directory is written under a temporary name, fsynced, then renamed."""

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
from safetensors import SafetensorError
from safetensors.torch import save_file

from qdora.errors import InputError

_REPLACED, _REMOVED = ".replaced", ".removed"


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file atomically.

    Args:
        path: the final name; its directory is made where missing.
        write: writes the file at the path it is given.
    Raises: InputError: the device is full, or the directory cannot be written; `path` is as before.
    """
    with wrap_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            write(temporary)
            temporary.chmod(0o644)
            fsync(temporary)
            temporary.replace(path)
            fsync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text as `write_file` does."""
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON as `write_file` does."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path, error: type[InputError] = InputError) -> dict[str, Any]:
    """Read a JSON object.

    Raises: InputError: missing, unreadable, not JSON or not an object; it is of type `error`.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{path}: no such file") from None
    except (OSError, ValueError) as cause:
        raise error(f"{path}: not readable as JSON: {cause}") from None
    if not isinstance(value, dict):
        raise error(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, the same bytes for the same contents; not atomic by itself.

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


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling directory, which becomes `path` if the block succeeds.

    A directory that stood at `path` is replaced only then.

    Raises: InputError: the device is full, or the directory cannot be written; nothing is left behind.
    """
    with wrap_os_errors(path):
        temporary = temporary_directory(path)
        try:
            yield temporary
            replace_directory(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def temporary_directory(path: Path) -> Path:
    """Make a hidden directory beside `path`, for files that `replace_directory` then publishes.

    Raises: InputError: it cannot be made.
    """
    with wrap_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))


def replace_directory(temporary: Path, path: Path) -> None:
    """Fsync a temporary directory with all its files and rename it to `path`, replacing what stood there.

    Raises: InputError: the device is full, or the directory cannot be written; `path` is as before.
    """
    with wrap_os_errors(path):
        for file in [*temporary.rglob("*"), temporary]:
            # Temporary files are private; what they become is as readable as any other file.
            file.chmod(0o755 if file.is_dir() else 0o644)
            fsync(file)
        _exchange(temporary, path, temporary.with_name(temporary.name + _REPLACED))
        fsync(path.parent)


def _exchange(new: Path, path: Path, replaced: Path) -> None:
    """Rename `path` to `replaced` and `new` to `path`; undone if the second rename fails."""
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


def remove(path: Path) -> None:
    """Remove a file, or a directory as one: it is complete or absent, whenever the process is killed.

    Raises: InputError: it cannot be removed.
    """
    with wrap_os_errors(path):
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
            return
        hidden = path.with_name(f".{path.name}{_REMOVED}")
        if hidden.exists():
            shutil.rmtree(hidden)
        path.rename(hidden)
        shutil.rmtree(hidden)


def clear_leftovers(folder: Path, name: str) -> None:
    """Remove the temporary files and directories of a process that was killed while it wrote to `folder`.

    If it was killed between the two renames that replace a directory, the old one is restored.

    Args:
        name: glob pattern of the files and directories that were written.
    Raises: InputError: the folder cannot be written.
    """
    with wrap_os_errors(folder):
        for left in sorted(folder.glob(f".{name}.*")):
            path = folder / left.name.removesuffix(_REPLACED)[1:].rpartition(".")[0]
            if left.name.endswith(_REPLACED) and not os.path.lexists(path):
                left.rename(path)
            elif left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink()


def fsync(path: Path) -> None:
    """Fsync a file's contents, or a directory's entries."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def wrap_os_errors(path: Path) -> Iterator[None]:
    """Turn errors of the operating system inside the block into `InputError`s that name `path`.

    Raises: InputError: something could not be written.
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error
    except SafetensorError as error:
        # The library reports errors of the operating system as an exception of its own.
        if "os error" not in str(error).lower():
            raise
        raise InputError(f"{path}: cannot be written: {error}") from error
