"""Atomic writes: a file or a directory is written under a temporary name, fsynced, then renamed.

A process that is killed while it writes leaves `.NAME.tmp-RANDOM` behind; the next write of NAME removes it.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from qdora.errors import InputError

if TYPE_CHECKING:
    import torch

TEMPORARY = ".tmp-"
"""Behind `.NAME`, before a random end: what is being written, and is removed at the next write of NAME."""
_REPLACED, _REMOVED = ".replaced", ".removed"


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file atomically.

    Args:
        path: the final name; its directory is made where missing.
        write: writes the file at the path it is given.
    Raises: InputError: the device is full, or the directory cannot be written; `path` is as before.
    """
    with wrap_os_errors(path), _locked_sibling(path, _temporary_file) as temporary:
        write(temporary)
        temporary.chmod(0o644)
        fsync(temporary)
        temporary.replace(path)
        fsync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text as `write_file` does."""
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON as `write_file` does."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows with the same keys as a table with a heading, as `write_file` does; None is an empty cell.

    Raises: ValueError: no rows, so that no heading is known.
    """
    if not rows:
        raise ValueError(f"{path}: a table of no rows")

    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)

    write_file(path, write)


def read_json(path: Path, error: type[InputError] = InputError) -> dict[str, Any]:
    """Read a JSON object.

    Raises: InputError: missing, unreadable, not JSON or not an object; it is of type `error`.
    """
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise error(f"{path}: no such file") from None
    except OSError as cause:
        raise error(f"{path}: cannot be read: {cause.strerror or cause}") from None
    return parse_object(text, str(path), error)


def parse_object(text: str | bytes, where: str, error: type[InputError] = InputError) -> dict[str, Any]:
    """The JSON object that a text is.

    Args:
        where: begins the message of an error.
    Raises: InputError: not JSON, not an object, or a key stands there twice; it is of type `error`.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unrepeated)
    except (ValueError, RecursionError) as cause:
        raise error(f"{where}: not valid JSON: {cause}") from None
    if not isinstance(value, dict):
        raise error(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    twice = [name for name in names if names.count(name) > 1] if len(set(names)) < len(names) else []
    if twice:
        raise ValueError(f"key {twice[0]!r} stands there twice")
    return dict(pairs)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, the same bytes for the same contents; not atomic by itself.

    The library writes metadata in an order that changes from call to call.
    """
    from safetensors.torch import save_file  # with torch

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
    with wrap_os_errors(path), staging_directory(path) as temporary:
        yield temporary
        replace_directory(temporary, path)


@contextmanager
def staging_directory(path: Path) -> Iterator[Path]:
    """Yield a hidden directory beside `path`; what is in it at the end is removed.

    Raises: InputError: it cannot be made.
    """
    with _locked_sibling(path, temporary_directory) as temporary:
        yield temporary


@contextmanager
def _locked_sibling(path: Path, make: Callable[[Path], Path]) -> Iterator[Path]:
    """Make a temporary file or directory, and remove what is left of it at the end.

    Those that a killed process left are removed first; it has lost the lock on them, which a running one has.
    """
    with wrap_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".{glob.escape(path.name)}{TEMPORARY}*"):
            with contextlib.suppress(OSError), _locked(left):
                _clear(left)
        temporary = make(path)
    with contextlib.ExitStack() as lock:
        with contextlib.suppress(OSError):  # a file system without locks: leftovers stay there
            lock.enter_context(_locked(temporary))
        try:
            yield temporary
        finally:
            with contextlib.suppress(OSError):
                _delete(temporary)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file or directory.

    Raises: OSError: another process has it, or the file system knows no locks.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _temporary_file(path: Path) -> Path:
    handle, name = tempfile.mkstemp(prefix=f".{path.name}{TEMPORARY}", dir=path.parent)
    os.close(handle)
    return Path(name)


def temporary_directory(path: Path) -> Path:
    """Make a hidden directory beside `path`, for files that `replace_directory` then publishes.

    Raises: InputError: it cannot be made.
    """
    with wrap_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{path.name}{TEMPORARY}", dir=path.parent))


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


def _exchange(new: Path, path: Path, replaced: Path) -> None:
    """Rename `path` to `replaced` and `new` to `path`, and fsync the renames; undone if that fails."""
    try:
        if os.path.lexists(path):
            path.rename(replaced)
        new.rename(path)
        fsync(path.parent)
    except BaseException:
        if not os.path.lexists(new):
            path.rename(new)
        if os.path.lexists(replaced) and not os.path.lexists(path):
            replaced.rename(path)
        raise
    with contextlib.suppress(OSError):  # the new one stands; what is left here goes at the next write
        _delete(replaced)


def remove(path: Path) -> None:
    """Remove a file, or a directory as one: it is complete or absent, whenever the process is killed.

    Raises: InputError: it cannot be removed.
    """
    with wrap_os_errors(path):
        hidden = path.with_name(f".{path.name}{_REMOVED}")
        _delete(hidden)
        if os.path.lexists(path):
            path.rename(hidden)
            _delete(hidden)


def _delete(path: Path) -> None:
    """Remove a file, a link or a directory, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def clear_leftovers(folder: Path, name: str) -> None:
    """Remove the temporary directories of a process that was killed while it wrote to `folder`.

    If it was killed between the two renames that replace a directory, the old one is restored.

    Args:
        name: glob pattern of the directories that were written or removed.
    Raises: InputError: the folder cannot be written.
    """
    with wrap_os_errors(folder):
        for left in sorted([*folder.glob(f".{name}{TEMPORARY}*"), *folder.glob(f".{name}{_REMOVED}")]):
            _clear(left)


def _clear(left: Path) -> None:
    path = left.with_name(left.name.removesuffix(_REPLACED)[1:].rpartition(".")[0])
    if left.name.endswith(_REPLACED) and not os.path.lexists(path):
        left.rename(path)
    else:
        _delete(left)


def path_exists(path: Path) -> bool:
    """Whether there is such a file or folder; no name is too long to ask, as it is for the method."""
    return os.path.exists(path)  # noqa: PTH110


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
