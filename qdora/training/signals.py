"""Requests to stop: SIGTERM, Ctrl-C, or a launcher that has gone away."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """While entered, a first signal is only noted, so that the step in progress can end.

    A second Ctrl-C interrupts at once, as a user expects.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._previous: dict[int, signal.Handlers] = {}
        self._parent = os.getppid()

    def __enter__(self) -> StopRequest:
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._note)  # type: ignore[assignment]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def number(self) -> int | None:
        """The signal to stop for; None where nobody asked.

        `accelerate launch` does not pass SIGTERM on: its death is noticed by the change of parent.
        """
        if self._received is None and os.getppid() != self._parent:
            return int(signal.SIGTERM)
        return self._received

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = number
