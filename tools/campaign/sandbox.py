"""Cases in forked processes that are watched: what they write, run, load and take.

The parent has imported everything and computed nothing, so a fork is ready in milliseconds.
"""

from __future__ import annotations

import gc
import json
import os
import re
import resource
import selectors
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

from tqdm import tqdm

from qdora.tasks import math_verifier
from tools.campaign.report import Report

MEMORY = 2 << 30
"""Largest resident memory of a case, in bytes, with torch and the package in it."""
SECONDS = 60
"""Longest that a case may take."""
_CASES_OF_A_PROCESS = 250
_FORGET_PEAK = Path("/proc/self/clear_refs")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


@dataclass(frozen=True)
class Outcome:
    """How a case ended.

    Attributes:
        kind: of the case, for the counts.
        note: what was done to what, in words that tell one case from another.
        outcome: `refused`, `right`, ...
        fault: the promise that was broken; None where none was.
    """

    kind: str
    note: str
    outcome: str
    fault: str | None = None


class TooLongError(BaseException):
    """A case went on for longer than `SECONDS`; no handler of `Exception` may swallow it."""


def run_cases(
    play: Callable[[int, Path, Watch], Outcome], seeds: range, folder: Path, report: Report
) -> None:
    """Play a case for each seed, in as many processes as there are cores, and add to the report.

    Args:
        play: given the seed, an empty folder for the case, and the watch over its process.
        folder: for the cases; each is removed when it is over.
    """
    cores = len(os.sched_getaffinity(0))
    chunks = iter([seeds[i : i + _CASES_OF_A_PROCESS] for i in range(0, len(seeds), _CASES_OF_A_PROCESS)])
    with selectors.DefaultSelector() as selector, tqdm(total=len(seeds), unit="case", file=sys.stderr) as bar:
        for _ in range(cores):
            _start_next(selector, chunks, play, folder)
        while selector.get_map():
            for key, _ in selector.select():
                worker: _Worker = key.data
                line = worker.lines.readline()
                if line:
                    _count(report, worker.seeds[0], Outcome(**json.loads(line)))
                    worker.seeds = worker.seeds[1:]
                    bar.update()
                    continue
                selector.unregister(key.fileobj)
                worker.lines.close()
                status = os.waitstatus_to_exitcode(os.waitpid(worker.pid, 0)[1])
                if worker.seeds:  # it died in this case
                    died = Outcome("process", "", "died", f"its process died with status {status}")
                    _count(report, worker.seeds[0], died)
                    bar.update()
                    _start(selector, worker.seeds[1:], play, folder)
                else:
                    _start_next(selector, chunks, play, folder)


@dataclass
class _Worker:
    pid: int
    lines: BinaryIO
    seeds: range


def _start_next(selector: Any, chunks: Iterator[range], play: Any, folder: Path) -> None:
    seeds = next(chunks, None)
    if seeds is not None:
        _start(selector, seeds, play, folder)


def _start(selector: Any, seeds: range, play: Any, folder: Path) -> None:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        try:
            _work(play, seeds, folder, writing)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(writing)
    # Unbuffered: a line in a buffer of this process would not show in `select`.
    lines = os.fdopen(reading, "rb", 0)
    selector.register(lines, selectors.EVENT_READ, _Worker(pid, lines, seeds))


def _count(report: Report, seed: int, outcome: Outcome) -> None:
    if outcome.fault is None:
        report.count(outcome.kind, outcome.outcome)
    else:
        report.fault(outcome.kind, f"seed {seed}, {outcome.note}: {outcome.fault}")


def _work(play: Any, seeds: range, folder: Path, pipe: int) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (4 * MEMORY, 4 * MEMORY))  # the machine's other work lives on
    signal.signal(signal.SIGALRM, _ring)
    watch = Watch()
    gc.freeze()  # training collects garbage, which is to be a case's and not that of all imports
    for seed in seeds:
        case = folder / f"case-{seed}"
        case.mkdir()
        os.chdir(case)
        watch.begin(case)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            outcome = play(seed, case, watch)
        except BaseException:
            outcome = Outcome("campaign", "", "broken", f"the campaign itself: {traceback.format_exc()}")
        signal.setitimer(signal.ITIMER_REAL, 0)
        watch.end()
        if outcome.fault is None and watch.broken:
            outcome = Outcome(outcome.kind, outcome.note, "watched", "; ".join(watch.broken[:3]))
        os.chdir(folder)
        shutil.rmtree(case, ignore_errors=True)
        os.write(pipe, json.dumps(asdict(outcome)).encode() + b"\n")
    os._exit(0)


def _peak_memory() -> int:
    """Largest resident memory since it was forgotten, in bytes."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10


def _ring(number: int, frame: object) -> None:
    raise TooLongError


def _is_expected(program: Any, words: Any) -> bool:
    """Whether commands start such a process: git, for the manifest, or the one of math-verify."""
    return os.path.basename(str(program)) == "git" or str(math_verifier.WORKER) in words  # noqa: PTH119


class Watch:
    """What a case does that it must not, by Python's audit events and the kernel's peak of memory.

    Attributes:
        broken: what was broken, in words.
        writable: folders below which files may be written, made, renamed and removed.
    """

    # Audit events whose first arguments are paths that change.
    _CHANGES: ClassVar = {
        "os.mkdir": 1,
        "os.rename": 2,
        "os.remove": 1,
        "os.rmdir": 1,
        "os.link": 2,
        "os.truncate": 1,
        "os.symlink": 2,
        "shutil.rmtree": 1,
    }
    _FORBIDDEN = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "socket.connect")

    def __init__(self) -> None:
        self.broken: list[str] = []
        self.writable: tuple[Path, ...] = ()
        self._case: Path | None = None
        self._peak = 0
        sys.addaudithook(self._event)

    def begin(self, case: Path) -> None:
        """Watch a case that may write below its folder only."""
        _FORGET_PEAK.write_text("5")
        self.broken, self.writable, self._case, self._peak = [], (case,), case, 0

    def end(self) -> None:
        """Stop watching; note what the case took."""
        self._case = None
        peak = max(self._peak, _peak_memory())
        if peak > MEMORY:
            self.broken.append(f"took {peak / 2**30:.1f} GiB of memory")

    def _event(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._case is None:
            return
        if event == "open":
            path, mode, flags = arguments
            if path == str(_FORGET_PEAK):  # training measures its own peak
                self._peak = max(self._peak, _peak_memory())
            elif isinstance(path, (str, bytes, os.PathLike)) and flags & _WRITING:
                self._check_write(path, f"opened with mode {mode}")
        elif event in self._CHANGES:
            for path in arguments[: self._CHANGES[event]]:
                # A descriptor's name is that of a path which was opened before.
                if isinstance(path, (str, bytes, os.PathLike)):
                    self._check_write(path, event)
        elif event in self._FORBIDDEN:
            self.broken.append(f"{event} {arguments}")
        elif event == "subprocess.Popen" and not _is_expected(*arguments[:2]):
            self.broken.append(f"started {arguments[0]!r}")
        elif event == "exec" and str(self._case) in getattr(arguments[0], "co_filename", ""):
            self.broken.append(f"ran {arguments[0].co_filename}")

    def _check_write(self, path: str | bytes | os.PathLike[str], how: str) -> None:
        text = os.fsdecode(path)
        # The entry itself may be a link; what counts is the folder in which it stands.
        folder = os.path.realpath(os.path.dirname(os.path.abspath(text)))  # noqa: PTH100, PTH120
        real = Path(folder, os.path.basename(text))  # noqa: PTH119
        if text != os.devnull and not any(real.is_relative_to(allowed) for allowed in self.writable):
            self.broken.append(f"{how} outside its folder: {text}")
