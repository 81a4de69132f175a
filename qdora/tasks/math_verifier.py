"""math-verify as a scorer, in a process of its own.

It evaluates whatever a model writes, and bounds its time by SIGALRM: that works in the main thread alone,
takes the alarm from a training run, and does not end an operation on large integers.  So a process
with bounded memory is asked, which is killed when an answer takes too long.  (`expressions` reads single
expressions in this process, within bounds that make that safe.)
"""

from __future__ import annotations

import atexit
import json
import os
import queue
import re
import subprocess
import sys
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

LIMIT = 10.0
"""Seconds for one answer, which takes milliseconds; then there is none."""
_START = 300.0
"""Seconds until the process has imported sympy, also on a busy machine."""
_NO_BARE_LATEX = re.compile(r"\$|\n|\\[(\[]|\\boxed|(?<![\\a-zA-Z])[a-zA-Z]{2}")
"""A delimiter, several lines, a word."""
WORKER = Path(__file__).with_name("math_verify_worker.py")
"""The script that it runs."""


class Reading(NamedTuple):
    """What math-verify reads in two texts, and whether it takes them for the same."""

    extracted: str | None
    gold: str | None
    correct: bool


@lru_cache(maxsize=4096)
def compare(output: str, gold: str) -> Reading:
    """Ask math-verify whether an output gives the gold answer.

    Args:
        output, gold: texts that state an answer, read alike, with its defaults: of LaTeX or plain numbers
            the one after `answer is`, in a box, or the last.  A text that is all LaTeX, as gold answers are
            stored, is put between the signs of a formula, without which it reads none.
    Returns: nothing read, and not correct, where it fails, or takes more than `LIMIT` or 4 GiB.
    Raises: RuntimeError: its process cannot be started.
    """
    return _asked().ask([_delimited(output), _delimited(gold)])


def _delimited(text: str) -> str:
    bare = text.strip()
    return f"${bare}$" if "\\" in bare and not _NO_BARE_LATEX.search(bare) else text


class _Worker:
    """The process, and a thread that waits for its answers."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._start()

    def _start(self) -> None:
        # -P: the script's folder, which has a module `numbers`, must not come before the standard library.
        # A session of its own: Ctrl-C is for the process that asks.
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            start_new_session=True,
        )
        self.answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=_pass_on, args=(self.process, self.answers), daemon=True).start()
        if self._next(_START) is None:
            self.stop()
            raise RuntimeError(f"math-verify's process does not start: {sys.executable} -P {WORKER}")

    def ask(self, texts: list[str]) -> Reading:
        """One question; a process that does not answer in time is replaced."""
        with self.lock:
            assert self.process.stdin is not None
            try:
                print(json.dumps(texts), file=self.process.stdin, flush=True)
                answer = self._next(LIMIT)
            except OSError:
                answer = None
            if answer is not None:
                return Reading(**answer)
            self.stop()
            self._start()
            return Reading(None, None, False)

    def _next(self, seconds: float) -> Any:
        """Its next line; None where it ends or does not come in time."""
        try:
            line = self.answers.get(timeout=seconds)
        except queue.Empty:
            return None
        return json.loads(line) if line else None

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


def _pass_on(process: subprocess.Popen[str], answers: queue.Queue[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        answers.put(line)
    answers.put("")


_worker: _Worker | None = None
_starting = threading.Lock()


def _asked() -> _Worker:
    global _worker
    with _starting:
        if _worker is None:
            _worker = _Worker()
        return _worker


@atexit.register
def _stop() -> None:
    if _worker is not None:
        _worker.stop()


def _forget() -> None:
    """A process that was forked starts one of its own, and leaves its parent's alone."""
    global _worker, _starting
    _worker, _starting = None, threading.Lock()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_forget)
