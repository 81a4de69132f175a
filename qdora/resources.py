"""What a process takes of its machine: CPU threads, memory of the C heap, and sizes as people write them.

All threads of a step wait for the slowest, so one that waits for a core costs more than it brings: a command
takes as many as there are idle cores, and says so if others use them later: docs/performance.md has figures.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import re
import sys
import time
from functools import cache
from pathlib import Path
from typing import TypeVar

import psutil

from qdora.errors import InputError

T = TypeVar("T")

VARIABLE = "OMP_NUM_THREADS"
MEASURED_SECONDS = 0.5

SLOWER = 2.0
"""Times the fastest step's seconds per token from which a step is slow."""
STARVED = 0.6
"""Fraction of the CPU time that its threads could use, below which a process competes for cores."""


def choose_threads(asked: int | None) -> None:
    """Set torch's number of threads, for the processes that this one starts as well.

    The number asked for, else `OMP_NUM_THREADS` where the user has set it, else the idle cores, divided among
    the ranks of this machine. Says so on standard error where other programs leave fewer than all cores.

    Args:
        asked: with --threads; None where it was not given.
    Raises: InputError: a number below 1.
    """
    if asked is not None and asked < 1:
        raise InputError(f"--threads {asked}; allowed: 1 or more")
    if asked is None and set_by_user():
        return
    cores = _usable_cores()
    local_world_size = os.environ.get("LOCAL_WORLD_SIZE", "")
    ranks = max(1, int(local_world_size) if local_world_size.isdecimal() else 1)
    threads = asked or max(1, len(cores) // ranks)
    if asked is None and threads > 1:
        most, threads = threads, max(1, round(idle_cores(cores)) // ranks)
        if threads < most and os.environ.get("LOCAL_RANK", "0") == "0":
            print(
                f"computing with {threads} of {most} threads, other programs use the cores "
                f"(--threads or {VARIABLE} sets another number)",
                file=sys.stderr,
            )
    import torch

    torch.set_num_threads(threads)
    os.environ[VARIABLE] = str(threads)


def idle_cores(cores: list[int]) -> float:
    """How many of these cores no other program used, over half a second.

    What this process and the other ranks of its launch used does not count.
    """
    started, own = time.perf_counter(), _cpu_seconds_of_launch()
    percents = psutil.cpu_percent(MEASURED_SECONDS, percpu=True)
    own = (_cpu_seconds_of_launch() - own) / (time.perf_counter() - started)
    used = sum(percents[core] for core in cores if core < len(percents)) / 100
    return len(cores) - max(0.0, used - own)


class SlowdownWatch:
    """Notices that steps became slow because other programs use the cores; says so once.

    Args:
        threads: of this process.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._fastest, self._tokens = math.inf, 0
        self._slow_steps, self._said = 0, False

    def observe(self, tokens: int, seconds: float, cpu_seconds: float) -> str | None:
        """Take note of a step.

        Args:
            tokens: of the step; one with less than half as many as the fastest is not compared with it.
            seconds: wall time of the step.
            cpu_seconds: CPU time of this process in it, over all threads.
        Returns: the sentence, at the second slow step in a row; None at any other.
        """
        pace, used = seconds / tokens, cpu_seconds / seconds
        if pace < self._fastest:
            self._fastest, self._tokens = pace, tokens
        slow = pace >= SLOWER * self._fastest and 2 * tokens >= self._tokens
        self._slow_steps = self._slow_steps + 1 if slow and used < STARVED * self.threads else 0
        if self._said or self._slow_steps < 2:
            return None
        self._said = True
        got = f"{self.threads} thread{'s' if self.threads > 1 else ''} got {used:.1f} cores"
        fewer = f", or stop and --resume with fewer threads (--threads or {VARIABLE})"
        return (
            f"a step takes {pace / self._fastest:.1f} times as long as the fastest one, because {got}: "
            f"close the programs that use the rest{fewer if self.threads > 1 else ''}"
        )


def set_by_user() -> bool:
    """Whether the user has set OMP_NUM_THREADS, which accelerate and torchrun set where the user has not."""
    launcher = _launcher()
    if VARIABLE not in os.environ or launcher is None:
        return VARIABLE in os.environ
    with contextlib.suppress(psutil.Error):
        options = " ".join(launcher.cmdline()).replace("-", "_")
        return VARIABLE in launcher.environ() or "num_cpu_threads_per_process" in options
    return os.environ[VARIABLE] != "1"


def _launcher() -> psutil.Process | None:
    """The process of accelerate or torchrun that started this one; None where neither did."""
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    return psutil.Process().parent() if launched else None


def _usable_cores() -> list[int]:
    affinity = getattr(os, "sched_getaffinity", None)
    return sorted(affinity(0)) if affinity else list(range(os.cpu_count() or 1))


def _cpu_seconds_of_launch() -> float:
    """CPU time so far of this process, and of all that its launcher started."""
    root, seconds = _launcher() or psutil.Process(), 0.0
    for process in [root, *root.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):  # ended, or another user's
            times = process.cpu_times()
            seconds += times.user + times.system
    return seconds


_CGROUPS, _OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def available_memory() -> int:
    """Bytes of memory that this process may still take, of the machine and of a container with a limit."""
    return int(min(psutil.virtual_memory().available, _left_in_container()))


def _left_in_container() -> float:
    """Infinite where no group of version 2 that this process is in has a limit."""
    left = math.inf
    with contextlib.suppress(OSError, ValueError):
        own = _OWN_CGROUP.read_text().strip().rpartition("::/")[2]
        folder = _CGROUPS / own
        for group in [folder, *folder.parents]:
            limit = group / "memory.max"
            if limit.is_file() and (most := limit.read_text().strip()) != "max":
                used = int((group / "memory.current").read_text())
                statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                # Pages of files are given back when others need them.
                left = min(left, int(most) - used + int(statistics.get("inactive_file", 0)))
    return left


# Parameters of mallopt, from malloc.h, and the largest threshold that glibc takes on 64 bits.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 << 20

WORTH_TRIMMING = 1 << 20
"""Bytes of a freed tensor from which on `release_freed_memory` pays."""


def release_freed_memory() -> None:
    """Return free pages of the C heap; without effect where the C library cannot.

    The short-lived 16-bit tensors of a loading model leave holes between the 4-bit ones that stay.
    By default glibc keeps those, and a process that holds a 4-bit model grows to the size of the
    16-bit one.
    """
    if hasattr(_libc(), "malloc_trim"):
        _libc().malloc_trim(0)


def keep_freed_memory() -> None:
    """Let the C heap keep what a training step frees, for the next step to take again.

    By default glibc returns large blocks to the system and gets them back zeroed, page by page: thousands
    of page faults a step.  The peak stays the same.  Without effect where the C library cannot.
    """
    if hasattr(_libc(), "mallopt"):
        _libc().mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        _libc().mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)  # the symbols of this process, which is linked to the C library


_UNITS = {"B": 1} | {
    f"{prefix}{binary}B": (1024 if binary else 1000) ** power
    for power, prefix in enumerate("KMGT", start=1)
    for binary in ("", "i")
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)")


def parse_size(text: str, option: str) -> int:
    """Bytes of "24GiB" (2**30 each) or "24GB" (10**9 each).

    Args:
        option: its name in the error.
    Raises: InputError: not a number with a unit, or 0.
    """
    match = _SIZE.fullmatch(text.strip())
    unit = None if match is None else next((u for u in _UNITS if u.lower() == match[2].lower()), None)
    if match is None or unit is None or float(match[1]) <= 0:
        raise InputError(
            f"{option} {text!r}: expected a size above 0 with its unit, 24GiB (24 * 2**30 bytes) or 24GB "
            f"(24 * 10**9 bytes); allowed units: {', '.join(_UNITS)}"
        )
    return int(float(match[1]) * _UNITS[unit])


def show_size(count: int) -> str:
    """Bytes in the binary unit that fits."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if count >= _UNITS[unit]:
            return f"{count / _UNITS[unit]:.2f} {unit}"
    return f"{count} B"
