"""Numbers of optimizer steps and of validations: measured, written to metrics.jsonl, read back."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import resource
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pydantic import TypeAdapter, ValidationError

from qdora.errors import InputError
from qdora.files import wrap_os_errors, write_text

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class StepMetrics:
    """The line of metrics.jsonl for an optimizer step.

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


@dataclass(frozen=True)
class ValidationMetrics:
    """The line of metrics.jsonl for a validation.

    Attributes:
        step: optimizer steps done before it; 0 before training.
        validation_loss: mean over the completion tokens of all validation examples, nats.
        seconds: duration of the validation.
        validation_losses: the same of each task, where there are several.
        validation_exact_match: fraction of the examples that are answered correctly; None where none is.
    """

    step: int
    validation_loss: float
    seconds: float
    validation_losses: dict[str, float] = field(default_factory=dict)
    validation_exact_match: float | None = None

    def line(self) -> str:
        """As JSON, with a newline; what was not measured is left out."""
        values = dataclasses.asdict(self)
        return json.dumps({key: value for key, value in values.items() if value not in (None, {})}) + "\n"

    def tracked(self) -> dict[str, float]:
        """Numbers by name, as trackers take them."""
        values = {"validation_loss": self.validation_loss}
        if self.validation_exact_match is not None:
            values["validation_exact_match"] = self.validation_exact_match
        return values | {f"validation_loss/{task}": loss for task, loss in self.validation_losses.items()}

    def __str__(self) -> str:
        text = f"validation loss {self.validation_loss:.4f}"
        if self.validation_losses:
            text += f" ({', '.join(f'{task} {loss:.4f}' for task, loss in self.validation_losses.items())})"
        if self.validation_exact_match is not None:
            text += f", exact match {self.validation_exact_match:.1%}"
        return text


T = TypeVar("T")
_STEP: TypeAdapter[StepMetrics] = TypeAdapter(StepMetrics)
_VALIDATION: TypeAdapter[ValidationMetrics] = TypeAdapter(ValidationMetrics)


def append_metrics(path: Path, metrics: StepMetrics | ValidationMetrics) -> None:
    """Append one line to metrics.jsonl.

    Raises: InputError: the device is full, or the file cannot be written.
    """
    with wrap_os_errors(path), path.open("a", encoding="utf-8") as file:
        file.write(metrics.line())


def read_metrics(path: Path) -> list[StepMetrics]:
    """The steps of a run, oldest first; damaged lines, such as a kill leaves, are left out.

    Raises: InputError: the file cannot be read.
    """
    return _read(path, _STEP)


def read_validations(path: Path) -> list[ValidationMetrics]:
    """The validations of a run, oldest first; damaged lines are left out.

    Raises: InputError: the file cannot be read.
    """
    return _read(path, _VALIDATION)


def _read(path: Path, kind: TypeAdapter[T]) -> list[T]:
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    found = []
    for line in lines:
        with contextlib.suppress(ValidationError):
            found.append(kind.validate_json(line, strict=True))
    return found


def keep_until(path: Path, step: int, validated: int = -1) -> int:
    """Drop the lines after `step`: a resumed run writes them again.

    Args:
        validated: the step of the last validation that counts; -1 for none.
    Returns: how many steps up to it are missing.
    """
    steps = {m.step: m for m in read_metrics(path) if m.step <= step}
    validations = {m.step: m for m in read_validations(path) if m.step <= validated}
    if path.exists():
        lines = [(m.step, 0, m.line()) for m in steps.values()]
        lines += [(m.step, 1, m.line()) for m in validations.values()]
        write_text(path, "".join(line for *_, line in sorted(lines)))
    return step - len(steps)


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
