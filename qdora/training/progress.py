"""The progress bar of a training run."""

from __future__ import annotations

import sys
from types import TracebackType

from tqdm import tqdm

from qdora.training.metrics import StepMetrics


class TrainingBar:
    """Steps done, loss, tokens per second and time left, on standard error of the main process."""

    def __init__(self, total_steps: int, start: int, *, shown: bool) -> None:
        # A log file wants a line now and then, a terminal a live bar.
        interval = 0.5 if sys.stderr.isatty() else 15.0
        self._bar = tqdm(
            total=total_steps,
            initial=start,
            desc="Training",
            unit="step",
            disable=not shown,
            mininterval=interval,
        )

    def __enter__(self) -> TrainingBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def show(self, metrics: StepMetrics) -> None:
        """Advance by one step."""
        self._bar.set_postfix_str(
            f"loss {metrics.loss:.4f}, {metrics.tokens_per_second:,.0f} tokens/s", refresh=False
        )
        self._bar.update()

    def say(self, text: str) -> None:
        """A line above the bar."""
        if not self._bar.disable:
            self._bar.write(text, file=sys.stderr)
