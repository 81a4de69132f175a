"""Where commands write: checked before the work, and locked against other processes until its end.

The kernel releases a lock when its process ends, however it ends.  A POSIX lock belongs to one process, so
a child that outlives it does not keep it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qdora.errors import InputError
from qdora.files import TEMPORARY

LOCK = ".lock"

_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
_READ_ONLY = {errno.EACCES, errno.EPERM, errno.EROFS}
_PATIENCE = 20
# Closing a file releases every lock of this process on it, so it must not be opened a second time.
_held: set[Path] = set()


@contextmanager
def locked(file: Path, name: str, *, shared: bool = False) -> Iterator[None]:
    """Hold a lock file in the block; afterwards it is gone, and the folders made for it where still empty.

    Where a file system has no locks, that is said and the work goes on.

    Args:
        file: the lock file.
        name: of what is locked, as the user gave it: `output.dir runs/a`.
        shared: several processes may hold it so, none exclusively; without a lock where it cannot be made
            because nothing can be written there.
    Raises: InputError: another process holds it, which is named; the folder cannot be written, and why.
    """
    with _made(file.parent, name):
        with _explained(file.parent, name):
            path = file.parent.resolve() / file.name
            if path in _held:
                raise InputError(f"{name} is in use by this process itself")
            handle = _acquire(path, name, shared)
        if handle is None:
            yield
            return
        _held.add(path)
        try:
            yield
        finally:
            _held.remove(path)
            _release(path, handle)


def check_writable(path: Path, name: str) -> None:
    """Find out before the work whether a file or folder can be written; nothing is left.

    Args:
        path: of a file or folder that is going to be written atomically.
        name: as the user gave it: `--json out/figures.json`.
    Raises: InputError: it cannot, and why.
    """
    with _made(path.parent, name), _explained(path.parent, name):
        # As long as the longest name that an atomic write takes; after a kill the next write removes it.
        handle, probe = tempfile.mkstemp("-checking", f".{path.name}{TEMPORARY}", path.parent)
        os.close(handle)
        Path(probe).unlink()


def check_file(path: str | None, option: str) -> Path | None:
    """The file that an option names, if it can be written; None where the option was not given.

    Raises: InputError: as `check_writable`, or there is a folder of that name.
    """
    if path is None:
        return None
    if Path(path).is_dir():
        raise InputError(f"{option} {path} cannot be written: it is a folder; name a file")
    check_writable(Path(path), f"{option} {path}")
    return Path(path)


def check_output(directory: Path, overwrite: bool) -> None:
    """Raises: InputError: an export cannot be written there, or would replace something unasked."""
    check_writable(directory, f"the output {directory}")
    if os.path.ismount(directory):
        raise InputError(
            f"the output {directory} is a mount point, which is not replaced; name a folder in it"
        )
    if directory.exists() and not overwrite and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(f"{directory}: already exists and is not empty; choose another or pass --overwrite")


@contextmanager
def _made(folder: Path, name: str) -> Iterator[None]:
    """Make a folder with its parents; those that are still empty after the block are removed again."""
    made: list[Path] = []
    try:
        with _explained(folder, name):
            for part in (*reversed(folder.parents), folder):
                if not part.is_dir():
                    part.mkdir(exist_ok=True)
                    made.append(part)
        yield
    finally:
        for part in reversed(made):
            with suppress(OSError):
                part.rmdir()


@contextmanager
def _explained(folder: Path, name: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{name!r} cannot be written: {error}") from None  # a null character
    except OSError as error:
        reason = error.strerror or str(error)
        for part in (folder, *folder.parents):
            if os.path.isfile(part):  # noqa: PTH113  (the method raises where a name is too long)
                reason = f"{part} is a file"
            elif os.path.islink(part) and not os.path.exists(part):  # noqa: PTH110, PTH114
                reason = f"{part} is a symbolic link to nothing"
        raise InputError(f"{name} cannot be written: {reason}") from None


def _acquire(path: Path, name: str, shared: bool) -> int | None:
    """Open and lock the file at `path`; None where `shared` and nothing can be written there.

    Raises: InputError: another process holds it.
    """
    removed = 0
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            # Another process has just ended and removed the folder that it had made, or no file can be made.
            removed += 1
            if removed > _PATIENCE:
                raise
            path.parent.mkdir(parents=True, exist_ok=True)
            continue
        except OSError as error:
            if shared and error.errno in _READ_ONLY:
                return None
            raise
        try:
            fcntl.lockf(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(handle, 1000, 0).decode(errors="replace")
            if error.errno not in _NO_LOCKS:
                os.close(handle)
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise
                raise InputError(
                    f"{name} is in use by {holder or 'another process'}; wait until it has ended, or choose "
                    f"another folder"
                ) from None
            print(
                f"{name}: this file system has no locks ({error.strerror}); let no other process write there",
                file=sys.stderr,
            )
        if _is_at(handle, path):
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {platform.node()}".encode(), 0)
            return handle
        os.close(handle)  # its holder has removed it in between


def _release(path: Path, handle: int) -> None:
    with suppress(OSError):  # other processes share it, or the file system is gone
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(handle, path):
            path.unlink()
    os.close(handle)


def _is_at(handle: int, path: Path) -> bool:
    """Whether an open file is the one that has this name now."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False
