"""The best validation of a run so far, its adapter, and both in checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from qdora.distributed.context import DistributedContext
from qdora.files import atomic_directory, remove

Measure = Literal["loss", "exact_match"]


@dataclass(frozen=True)
class ValidationState:
    """What a checkpoint keeps of the validations before it.

    Attributes:
        step: of the last one; -1 before any.
        best_step, best_value: of the best one, the first of equally good ones.
        since: validations after the best one.
    """

    step: int = -1
    best_step: int | None = None
    best_value: float | None = None
    since: int = 0

    def after(self, step: int, value: float, measure: Measure) -> ValidationState:
        """The state with one more validation."""
        sign = 1 if measure == "loss" else -1
        if self.best_value is None or sign * value < sign * self.best_value:
            return ValidationState(step, step, value)
        return replace(self, step=step, since=self.since + 1)

    def best(self, measure: Measure) -> dict[str, Any] | None:
        """The best one as a manifest has it; None before any."""
        if self.best_step is None:
            return None
        return {"step": self.best_step, "measure": measure, "value": self.best_value}


def save_best(save: Callable[[Path | None], None], folder: Path, context: DistributedContext) -> None:
    """Write the adapter as it is now in place of the best one so far; a collective.

    Args:
        save: writes the adapter into a folder, of the ranks without one their shards.
    Raises: InputError: on all ranks, where it cannot be written.
    """
    with (
        context.raise_on_all_ranks(),
        atomic_directory(folder) if context.is_main else nullcontext() as staged,
    ):
        save(staged)


def copy_best(source: Path, folder: Path) -> None:
    """Copy the best adapter into a checkpoint, or from one; without one at the source there is none here.

    Raises: InputError: it cannot be copied.
    """
    if not source.is_dir():
        remove(folder)
        return
    with atomic_directory(folder) as staged:
        shutil.copytree(source, staged, dirs_exist_ok=True)
