"""Python processes that begin with their imports done: a server has them, and each process is a fork of it.

What they run is what `python` with the same words would run; only its start is shorter, by the seconds that
torch and transformers take to import. What is tested of a start itself uses `subprocess`.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path

_COMMANDS = ("train", "evaluate", "export", "compare", "chat")
PRELOADED = (
    *(f"qdora.{half}.{name}" for half in ("cli", "commands") for name in _COMMANDS),
    "qdora.experiments.plots",
    "qdora.models.formats.gguf",
    "bitsandbytes",
    "matplotlib.backends.backend_agg",
    "scipy.stats",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
)
"""What the commands import, now or when they use it."""


def server(*more: str) -> ForkServerContext:
    """The context of the server, which starts with the first process.  It has no threads and has computed
    nothing, so that its children start as a new process would."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*more, *PRELOADED])
    return context


class Forked:
    """A Python process with the words of its command line, to be used as a `subprocess.Popen` of text is.

    Args:
        words: a script, `-m` and a module, or `-c` and code, and the arguments.
        cwd: where it runs.
        env: all of its environment.
    """

    def __init__(self, words: Sequence[str], *, cwd: Path, env: Mapping[str, str]) -> None:
        self._output = tempfile.NamedTemporaryFile()  # noqa: SIM115  (closed, and removed, with this object)
        arguments = (list(words), str(cwd), dict(env), self._output.name)
        self._process = server().Process(target=_run, args=arguments)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """As `Popen` has it, but without `poll`."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """Wait for the end; what it wrote to either output."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired("forked", timeout)
        return Path(self._output.name).read_text(errors="replace"), None

    def send_signal(self, number: int) -> None:
        """Nothing where it has ended."""
        if self._process.exitcode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Nothing where it has ended."""
        self._process.kill()


class InTerminal:
    """A Python process as `Forked`, in a terminal of its own; a context manager, which ends it.

    Args:
        words, cwd, env: as of `Forked`.
    """

    def __init__(self, words: Sequence[str], *, cwd: Path, env: Mapping[str, str]) -> None:
        self._ours, self._theirs = os.openpty()
        arguments = (list(words), str(cwd), dict(env), os.ttyname(self._theirs))
        self._process = server().Process(target=_run_in_terminal, args=arguments)
        self._process.start()

    def __enter__(self) -> InTerminal:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()
        os.close(self._ours)
        os.close(self._theirs)

    def type(self, text: str) -> None:
        """As from the keyboard; control characters are what their keys are."""
        os.write(self._ours, text.encode())

    def read_until(self, end: str, timeout: float = 60) -> str:
        """What the terminal shows from here on up to `end`, line ends as `\\n`."""
        shown, deadline = b"", time.monotonic() + timeout
        while end.encode() not in shown.replace(b"\r\n", b"\n"):
            left = deadline - time.monotonic()
            if left < 0 or not select.select([self._ours], [], [], left)[0]:
                raise AssertionError(f"no {end!r} after {timeout} s, but {shown[-2000:]!r}")
            # One byte at a time, so that nothing behind `end` is lost.
            shown += os.read(self._ours, 1)
        return shown.replace(b"\r\n", b"\n").decode(errors="replace")

    def wait(self, timeout: float = 60) -> int | None:
        """The exit code; None where it runs on."""
        self._process.join(timeout)
        return self._process.exitcode


def _run(words: list[str], cwd: str, environment: dict[str, str], output: str) -> None:
    handle = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    _begin(words, cwd, environment)


def _begin(words: list[str], cwd: str, environment: dict[str, str]) -> None:
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    multiprocessing.set_start_method("fork", force=True)  # as in a new process: nothing hangs on the server
    first, *rest = words
    if first == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(first, run_name="__main__")


def _run_in_terminal(words: list[str], cwd: str, environment: dict[str, str], terminal: str) -> None:
    os.setsid()
    handle = os.open(terminal, os.O_RDWR)  # the first one that a session opens is its terminal
    for standard in range(3):
        os.dup2(handle, standard)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    _begin(words, cwd, environment)
