"""Numbers of an optimizer step: measured, written to metrics.jsonl, read back, shown on a progress bar."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import TypeAdapter, ValidationError
from tqdm import tqdm

from qdora.errors import InputError
from qdora.files import wrap_os_errors, write_text

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class StepMetrics:
    """One line of metrics.jsonl.

    Attributes:
        step: counted from 1.
        loss: mean over the completion tokens of the global batch, nats.
        lr: learning rate of this step.
        grad_norm: global norm before clipping.
        tokens: tokens processed by all ranks, prompts included, padding not.
        tokens_per_second: over this step, of all ranks.
        peak_memory_bytes: of this rank; on CUDA of the device's allocator.
        seconds: duration of the step.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    tokens_per_second: float
    peak_memory_bytes: int
    seconds: float

    def line(self) -> str:
        """As JSON, with a newline."""
        return json.dumps(dataclasses.asdict(self)) + "\n"


_LINE = TypeAdapter(StepMetrics)


def append_metrics(path: Path, metrics: StepMetrics) -> None:
    """Append one line to metrics.jsonl.

    Raises: InputError: the device is full, or the file cannot be written.
    """
    with wrap_os_errors(path), path.open("a", encoding="utf-8") as file:
        file.write(metrics.line())


def read_metrics(path: Path) -> list[StepMetrics]:
    """The steps of a run, oldest first; damaged lines, such as a kill leaves, are left out.

    Raises: InputError: the file cannot be read.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    steps = []
    for line in lines:
        with contextlib.suppress(ValidationError):
            steps.append(_LINE.validate_json(line, strict=True))
    return steps


def keep_until(path: Path, step: int) -> int:
    """Drop the lines after `step`: a resumed run writes them again.

    Returns: how many lines up to it are missing.
    """
    kept = {m.step: m for m in read_metrics(path) if m.step <= step}
    if path.exists():
        write_text(path, "".join(m.line() for m in kept.values()))
    return step - len(kept)


def peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on CUDA, the process's peak resident memory elsewhere."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    # Unlike getrusage's figure, this one can be reset.
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    kilobyte = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobyte


def reset_peak_memory(device: torch.device) -> None:
    """Reset the peak: a process may hold several runs.  Without effect where the system cannot."""
    gc.collect()
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


class TrainingBar:
    """Steps done, loss, tokens per second and time left, on standard error of the main rank."""

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

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def show(self, metrics: StepMetrics) -> None:
        """Advance by one step."""
        self._bar.set_postfix_str(
            f"loss {metrics.loss:.4f}, {metrics.tokens_per_second:,.0f} tokens/s", refresh=False
        )
        self._bar.update()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if not self._bar.disable:
            self._bar.write(text, file=sys.stderr)
