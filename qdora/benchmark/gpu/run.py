"""The loop over the stages: each caught by itself, the file written again as each ends, a time limit."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from qdora.benchmark.gpu.sizes import Size

Figures = dict[str, Any]
"""What a stage measures, filled as it goes: plain values, and tables as lists of dicts."""


class OutOfTimeError(Exception):
    """The time limit came within a stage."""


class SkipStageError(Exception):
    """A stage has nothing to do here; the message says why."""


class Clock:
    """The time limit of a run, in seconds from now."""

    def __init__(self, seconds: float) -> None:
        self._limit, self._end = seconds, time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds, below 0 behind the limit."""
        return self._end - time.monotonic()

    def check(self) -> None:
        """Raises: OutOfTimeError: no time is left; stages ask between their parts."""
        if self.left <= 0:
            raise OutOfTimeError(f"the time limit of {self._limit:.0f} s came")


@dataclass(frozen=True)
class Setup:
    """What every stage gets.

    Attributes:
        folder: empty, for what a stage writes; gone after the run.
        model: the 135M model's GGUF file; None where there is none.
    """

    device: torch.device
    size: Size
    clock: Clock
    folder: Path
    model: Path | None = None


Stage = Callable[[Setup, Figures], None]
"""Measures into the figures; what it has put there stays if it fails."""
Record = dict[str, Any]
"""`stage`, `status`, where it has begun `seconds` and `figures`, where it is not done `reason` or `error`."""


@contextmanager
def attempt(figures: Figures, name: str) -> Iterator[None]:
    """A part of a stage whose failure leaves the other parts: its traceback goes to `figures["errors"]`.

    The stage counts as failed all the same, and its record has the tracebacks.
    """
    try:
        yield
    except OutOfTimeError:
        raise
    except Exception:
        figures.setdefault("errors", {})[name] = traceback.format_exc()


def run_stages(
    stages: Mapping[str, Stage],
    setup: Setup,
    write: Callable[[Sequence[Record]], None],
    done: Sequence[Record] = (),
    restart: Callable[[list[str]], None] | None = None,
) -> list[Record]:
    """Run the stages in their order.

    Args:
        write: called with the records of all stages before the first stage and after each.
        done: records of stages that a former process has run.
        restart: called with the names of the stages that are left where a stage has lost the device: no call
            of this process to it succeeds any more.
    Returns: a record of each stage.
    """
    records: list[Record] = [*done, *({"stage": name, "status": "not begun"} for name in stages)]
    own = records[len(done) :]
    write(records)
    for index, (record, (name, stage)) in enumerate(zip(own, stages.items(), strict=True)):
        if setup.clock.left <= 0:
            record |= {"status": "skipped", "reason": "the time limit came before it"}
            continue
        print(f"\n== {name} ({setup.clock.left:.0f} s left)", flush=True)
        record |= _run_stage(stage, setup)
        write(records)
        _show(record)
        left = list(stages)[index + 1 :]
        if left and restart is not None and record["status"] == "failed" and _is_lost(setup.device):
            restart(left)
    write(records)
    return records


def _run_stage(stage: Stage, setup: Setup) -> Record:
    started, figures = time.monotonic(), Figures()
    ended: Record
    try:
        stage(setup, figures)
        ended = {"status": "done"}
    except OutOfTimeError as stop:
        ended = {"status": "stopped", "reason": str(stop)}
    except SkipStageError as skip:
        ended = {"status": "skipped", "reason": str(skip)}
    except Exception:
        ended = {"status": "failed", "error": traceback.format_exc()}
    errors = figures.pop("errors", {})
    if errors:
        texts = [f"{name}: {text}" for name, text in errors.items()]
        ended |= {"status": "failed", "error": "\n".join([*texts, ended.get("error", "")]).rstrip()}
    gc.collect()
    if setup.device.type == "cuda":
        with attempt({}, "memory"):  # fails where the device is lost
            torch.cuda.empty_cache()
    return ended | {"seconds": round(time.monotonic() - started, 2), "figures": figures}


def _is_lost(device: torch.device) -> bool:
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def _show(record: Record) -> None:
    for name, value in record["figures"].items():
        if isinstance(value, list):
            print(f"\n{name}\n" + tabulate(value, headers="keys", floatfmt=".4g", missingval="-"))
        else:
            print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
    tail = record.get("error", record.get("reason", ""))
    print(f"{record['status']} in {record['seconds']:.1f} s" + (f": {tail}" if tail else ""), flush=True)
