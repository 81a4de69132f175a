"""SIGTERM and Ctrl-C at any moment of a command: one end, in order."""

from __future__ import annotations

import os
import signal
import sys
import threading
import types

import pytest

from qdora import cli, signals
from qdora.files import atomic_directory
from qdora.signals import StopSignal, raise_on_signals


@pytest.fixture(autouse=True)
def handlers():
    """Handlers that fail the test; afterwards those that were there."""

    def reached(number, frame):
        raise AssertionError(f"signal {number} was not handled")

    before = {number: signal.getsignal(number) for number in signals.STOPPING}
    for number in before:
        signal.signal(number, reached)
    yield reached
    for number, handler in before.items():
        signal.signal(number, handler)


def burst(number: int) -> None:
    for _ in range(5):
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", signals.STOPPING)
def test_a_burst_of_signals_ends_a_command_once_and_in_order(tmp_path, monkeypatch, capsys, number):
    """Catches: an export, an evaluation or a load that SIGTERM ends with its temporary files left behind; a
    second signal that breaks the clean-up, or ends in a traceback."""
    cleaned = []

    def work():
        with atomic_directory(tmp_path / "out") as folder:
            (folder / "x").write_text("half")
            try:
                burst(number)
            finally:
                burst(number)
                cleaned.append(True)

    command = types.SimpleNamespace(add_arguments=lambda parser: None, prepare=lambda parsed: work)
    monkeypatch.setitem(sys.modules, "qdora.cli.export", command)
    assert cli.run_command("export", []) == 128 + number
    said = capsys.readouterr().err
    assert said == f"qdora export: stopped by {signal.Signals(number).name}\n"
    assert cleaned == [True]
    assert list(tmp_path.iterdir()) == []
    # In what is left of the process a late signal must not raise either.
    assert [signal.getsignal(n) for n in signals.STOPPING] == [signal.SIG_DFL] * 2


def test_a_later_signal_ends_the_process_at_once(monkeypatch):
    """Catches: a clean-up that hangs, and cannot be ended but by kill -9."""
    ended, clock = [], [10.0]
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(signals.time, "monotonic", lambda: clock[0])
    with pytest.raises(StopSignal), raise_on_signals():  # noqa: PT012
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            clock[0] += signals.REPEATED - 0.1
            os.kill(os.getpid(), signal.SIGTERM)
            assert ended == []
            clock[0] += 0.2
            os.kill(os.getpid(), signal.SIGTERM)
            assert ended == [143]


def test_handlers_come_back_and_ignored_signals_stay_ignored(handlers):
    """Catches: a test or a program that calls a command and loses its own Ctrl-C; a job of nohup that a
    Ctrl-C in its terminal ends; a command that cannot run in a thread."""
    with raise_on_signals():
        assert signal.getsignal(signal.SIGTERM) != handlers
    assert [signal.getsignal(number) for number in signals.STOPPING] == [handlers] * 2
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with raise_on_signals():
        os.kill(os.getpid(), signal.SIGINT)
    seen = []

    def in_thread():
        with raise_on_signals():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=in_thread)
    thread.start()
    thread.join()
    assert seen == [handlers]
