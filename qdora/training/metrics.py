"""One line of numbers per optimizer step, and how they are written and read back."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from tqdm import tqdm

from qdora.files import write_text


@dataclass(frozen=True)
class StepMetrics:
    """What metrics.jsonl holds for a step.

    Attributes:
        step: counted from 1.
        loss: mean over the completion tokens of the whole batch, nats.
        lr: learning rate of this step.
        grad_norm: global norm before clipping.
        tokens: tokens processed, prompts included, padding not.
        tokens_per_second: over this step, all processes together.
        peak_memory_bytes: of this process; on CUDA of the device's allocator.
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


def append_metrics(path: Path, metrics: StepMetrics) -> None:
    """Add one line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(dataclasses.asdict(metrics)) + "\n")


def read_metrics(path: Path) -> list[StepMetrics]:
    """The steps of a run, oldest first; a last line cut short by a kill is left out."""
    steps = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            steps.append(StepMetrics(**json.loads(line)))
        except (json.JSONDecodeError, TypeError):
            break
    return steps


def keep_until(path: Path, step: int) -> None:
    """Drop the lines after `step`: a resumed run writes them again."""
    if path.exists():
        kept = [m for m in read_metrics(path) if m.step <= step]
        write_text(path, "".join(json.dumps(dataclasses.asdict(m)) + "\n" for m in kept))


def peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on CUDA, the process's peak resident memory elsewhere."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    for line in _read(Path("/proc/self/status")).splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    kilobyte = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobyte


def reset_peak_memory(device: torch.device) -> None:
    """Count the peak from here: several runs may share a process.  Without effect where the system cannot."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


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
