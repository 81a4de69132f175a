"""SIGTERM and Ctrl-C: a command that is asked to stop leaves nothing half-written, and says so.

And how a command ends that is not.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

STOPPING = (signal.SIGTERM, signal.SIGINT)
"""Signals that ask a process to stop."""

REPEATED = 1.0
"""Seconds in which further signals are the same request: a launcher passes on what the terminal has sent to
all of its processes already."""


class StopSignal(KeyboardInterrupt):
    """A signal asked this process to stop.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


@contextmanager
def raise_on_signals() -> Iterator[None]:
    """Raise `StopSignal` at the first SIGTERM or SIGINT, once; a second request ends the process at once.

    After a signal the system's own handling stays: what comes then finds a process that is about to end.
    Without effect outside the main thread, and for a signal that this process was started to ignore.

    Raises: StopSignal: from wherever the block is.
    """
    received: float | None = None

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal received
        if received is None:
            received = time.monotonic()
            raise StopSignal(number)
        if time.monotonic() - received >= REPEATED:
            os._exit(128 + number)

    main = threading.current_thread() is threading.main_thread()
    handled = [n for n in STOPPING if main and signal.getsignal(n) is not signal.SIG_IGN]
    previous: dict[int, Any] = {number: signal.signal(number, handle) for number in handled}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler if received is None else signal.SIG_DFL)


def end(code: int) -> NoReturn:
    """End this process with an exit code, its work done or refused.

    After a rendezvous an ordinary exit may abort in a thread of torch, whatever became of the work: in 7 of
    80 runs of a script that gathers and exits, and as often where the group is destroyed first.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        leave(code)
    sys.exit(code)


def leave(code: int) -> NoReturn:
    """End this process at once.

    An ordinary exit waits for threads of torch that wait for a lost process, or aborts in them.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
