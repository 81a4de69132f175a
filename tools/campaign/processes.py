"""Commands in forked processes: a server imports torch once, and every rank of every run is a child of it."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any, Protocol

from tests.distributed.ranks import ROOT, free_port
from tests.forked import server

COMMANDS = ("train", "evaluate", "export", "compare")
TIMEOUT = 20.0
"""QDORA_TIMEOUT of the ranks in seconds: how long a survivor may wait for a rank that never came."""
BOUND = TIMEOUT + 20
"""Seconds within which every rank has ended after one was killed or refused; the machine may be busy."""

_LOCK = threading.Lock()
BURST, BURST_SECONDS = 5, 0.05
"""Signals of a burst, and how long it lasts."""


class Fault(Protocol):
    """What goes wrong in a rank; installed in it before the command starts."""

    def install(self, folder: Path) -> None:
        """Args: folder: of the run's files; what lies elsewhere stays whole."""


@dataclass
class Run:
    """A command in one process a rank.

    Attributes:
        processes: by rank.
        logs: what each printed.
    """

    processes: list[ForkServerProcess]
    logs: list[Path]
    started: float = field(default_factory=time.monotonic)

    def codes(self) -> list[int | None]:
        """Exit codes by rank, negative for a signal; None of one that runs."""
        with _LOCK:  # the code is read from a pipe, once
            return [process.exitcode for process in self.processes]

    def signal(self, number: int, rank: int | None = None) -> bool:
        """Send a signal to a rank, or to all; whether one of them was there to get it."""
        sent = False
        for each, (process, code) in enumerate(zip(self.processes, self.codes(), strict=True)):
            if code is None and rank in (None, each) and process.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number)
                    sent = True
        return sent

    def wait(self, seconds: float = 120) -> list[int | None]:
        """Exit codes when all have ended; None of those that had not and were killed for it."""
        deadline = time.monotonic() + seconds
        while None in (codes := self.codes()) and time.monotonic() < deadline:
            time.sleep(0.01)
        if self.signal(signal.SIGKILL):
            while None in self.codes():
                time.sleep(0.01)
        return codes

    def wait_for_end(self, seconds: float = 120) -> list[int | None]:
        """As `wait`, but when one has ended with an error the others have `BOUND` seconds to end too."""
        deadline = time.monotonic() + seconds
        while not any(self.codes()) and None in self.codes() and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.wait(BOUND if any(self.codes()) else 0)

    @property
    def output(self) -> str:
        """What all ranks printed."""
        return "\n".join(log.read_text(errors="replace") for log in self.logs if log.exists())

    def orphans(self, patience: float = 5) -> list[int]:
        """Processes that a rank started and that outlived it by so many seconds; they are killed.

        One that asks git for the commit ends by itself.
        """
        deadline = time.monotonic() + patience
        while (found := self._living()) and time.monotonic() < deadline:
            time.sleep(0.05)
        for pid in found:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        return found

    def _living(self) -> list[int]:
        sessions = {process.pid for process in self.processes}
        found = []
        for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):  # noqa: PTH208
            with contextlib.suppress(OSError):
                if os.getsid(pid) in sessions and not _is_zombie(pid):
                    found.append(pid)
        return found


def _is_zombie(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def start(
    words: Sequence[str],
    folder: Path,
    *,
    ranks: int = 1,
    environment: dict[str, str] | None = None,
    fault: Fault | None = None,
    faulty_rank: int | None = 0,
) -> Run:
    """Start a command.

    Args:
        words: the command and its options.
        folder: of the run's files; temporary files and logs go into it.
        environment: as a launcher sets it, beyond rank and rendezvous.
        fault: of one rank, or of all where `faulty_rank` is None.
    """
    launched = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    launched |= {"MASTER_PORT": free_port(), "QDORA_TIMEOUT": f"{TIMEOUT:g}"} if ranks > 1 else {}
    (folder / "tmp").mkdir(parents=True, exist_ok=True)
    run = Run([], [folder / f"log-{rank}" for rank in range(ranks)])
    for rank, log in enumerate(run.logs):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), **launched} if ranks > 1 else {}
        own |= {"TMPDIR": str(folder / "tmp"), **(environment or {})}
        installed = fault if faulty_rank in (None, rank) else None
        process = _context().Process(target=_child, args=(list(words), folder, log, own, installed))
        with _LOCK:
            process.start()
        run.processes.append(process)
    return run


def start_server() -> None:
    """Start the server and wait for its imports, so that they do not count for the first run."""
    before = dict(os.environ)
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [before.get("PYTHONPATH")])])
    try:
        process = _context().Process(target=os.getpid)
        process.start()
        process.join()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _context() -> ForkServerContext:
    return server("__main__", __name__)


def _child(
    words: list[str], folder: Path, log: Path, environment: dict[str, str], fault: Fault | None
) -> None:
    os.setsid()  # by which what it starts is known
    multiprocessing.set_start_method("fork", force=True)
    handle = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ.update(environment)
    sys.argv = ["launch/train.py", *words]
    from qdora.cli import run_and_exit

    if fault is not None:
        fault.install(folder)
    run_and_exit(words[0], words[1:])


_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_EVENTS = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.truncate", "os.link")
_TAKES_SPACE = ("open", "os.mkdir", "os.fsync")


def watch_writes(folder: Path, see: Callable[[str, str], None]) -> None:
    """Call a function before each write to the file system below a folder, in whatever thread.

    What libraries write without Python (the data of a safetensors file) is not seen; the fsync after it is.

    Args:
        see: gets the event and the path; may raise, and then the write fails with that.
    """
    root, inside = f"{folder}/", threading.local()

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            if not isinstance(arguments[2], int) or not arguments[2] & _WRITING:
                return
            place = None
        elif event in _EVENTS:
            place = arguments[-1] if isinstance(arguments[-1], int) and event != "os.chmod" else None
        else:
            return
        if getattr(inside, "busy", False) or not isinstance(arguments[0], str | bytes | os.PathLike):
            return
        inside.busy = True
        try:
            path = os.fsdecode(arguments[0])
            if place is not None and place >= 0 and not path.startswith("/"):
                path = f"{os.readlink(f'/proc/self/fd/{place}')}/{path}"  # noqa: PTH115
            if path.startswith(root) and not path.startswith(f"{root}log-"):
                see(event, path)
        finally:
            inside.busy = False

    fsync = os.fsync

    def watched_fsync(handle: int) -> None:
        path = os.readlink(f"/proc/self/fd/{handle}")  # noqa: PTH115
        if path.startswith(root):
            see("os.fsync", path)
        fsync(handle)

    os.fsync = watched_fsync  # type: ignore[assignment]
    sys.addaudithook(audit)


def point(folder: Path, event: str, path: str) -> str:
    """A name for a place that writes: the event and the path, without numbers and random parts."""
    name = path.removeprefix(f"{folder}/")
    name = re.sub(r"\.tmp-[a-z0-9_]{8}", ".*", name)
    return f"{event.removeprefix('os.')} {re.sub(r'[0-9]+', 'N', name)}"


@dataclass(frozen=True)
class RecordWrites:
    """No fault: writes the point of every write into a file for each rank.

    Attributes:
        path: of the files, but for the rank at its end.
    """

    path: Path

    def install(self, folder: Path) -> None:
        """Begin."""
        name = f"{self.path}-{os.environ.get('RANK', '0')}"
        handle = os.open(name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)

        def see(event: str, path: str) -> None:
            os.write(handle, f"{point(folder, event, path)}\n".encode())

        watch_writes(folder, see)

    def read(self, rank: int = 0) -> Counter[str]:
        """How often each point came."""
        return Counter(Path(f"{self.path}-{rank}").read_text().splitlines())


@dataclass(frozen=True)
class AtWrite:
    """Something happens before a write.

    Attributes:
        point: which write.
        occurrence: of the point, from 0.
    """

    point: str
    occurrence: int

    def install(self, folder: Path) -> None:
        """Wait for it."""
        seen = [0]

        def see(event: str, path: str) -> None:
            if seen[0] <= self.occurrence:
                seen[0] += point(folder, event, path) == self.point
                if seen[0] > self.occurrence:
                    self.happen(event, path)
            else:
                self.afterwards(event, path)

        watch_writes(folder, see)

    def happen(self, event: str, path: str) -> None:
        """Before that write."""
        raise NotImplementedError

    def afterwards(self, event: str, path: str) -> None:
        """Before each later one."""


@dataclass(frozen=True)
class KillAtWrite(AtWrite):
    """SIGKILL."""

    def happen(self, event: str, path: str) -> None:
        """End."""
        os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class FailWrites(AtWrite):
    """A write fails as on a broken, full or read-only device.

    Attributes:
        code: EIO passes; ENOSPC and EDQUOT stay, and leave removing and renaming possible; EROFS stays.
    """

    code: int

    def happen(self, event: str, path: str) -> None:
        """Refuse."""
        if self.code not in (errno.ENOSPC, errno.EDQUOT) or event in _TAKES_SPACE:
            raise OSError(self.code, os.strerror(self.code), path)

    def afterwards(self, event: str, path: str) -> None:
        """Refuse, unless the error was a single one."""
        if self.code != errno.EIO:
            self.happen(event, path)


@dataclass(frozen=True)
class RemoveAtWrite(AtWrite):
    """A folder is removed, with all that is in it.

    Attributes:
        place: which.
    """

    place: Path

    def happen(self, event: str, path: str) -> None:
        """Remove it."""
        shutil.rmtree(self.place, ignore_errors=True)


@dataclass(frozen=True)
class SignalsAtWrite(AtWrite):
    """A burst of signals to this process.

    Attributes:
        number: of the signal.
    """

    number: int

    def happen(self, event: str, path: str) -> None:
        """Send the first now, the others while the process goes on."""
        for i in range(BURST):
            threading.Timer(i * BURST_SECONDS / BURST, os.kill, (os.getpid(), self.number)).start()
        time.sleep(BURST_SECONDS / BURST)


@dataclass(frozen=True)
class JumpingClock:
    """The wall clock is set by a number of seconds, now and then there and back.

    Attributes:
        seconds: of the jump.
        every: after so many readings.
    """

    seconds: float
    every: int

    def install(self, folder: Path) -> None:
        """Begin."""
        clock, calls = time.time, [0]

        def jumping() -> float:
            calls[0] += 1
            return clock() + self.seconds * (calls[0] // self.every % 2)

        time.time = jumping
