"""Time arms against each other: in one process, alternating, medians and ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from tqdm import tqdm

Arm = Callable[[], float]
"""Does its work once; returns the seconds of the part that counts."""


def alternate(
    arms: Mapping[str, Arm], rounds: int, *, warmup: int = 2, title: str = ""
) -> dict[str, list[float]]:
    """Run every arm once a round, each second round in the opposite order.

    A machine that becomes slower for a while slows all arms of its rounds, and no arm always
    follows the same other one, whose data lie in the caches.

    Args:
        warmup: rounds before the first that counts.
    Returns: seconds of each round, by arm.
    """
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    for i in tqdm(range(rounds + warmup), desc=title, unit="round", leave=False):
        for name in names if i % 2 else reversed(names):
            taken = arms[name]()
            if i >= warmup:
                seconds[name].append(taken)
    return seconds


def ratio(seconds: Mapping[str, Sequence[float]], arm: str, peer: str) -> float:
    """The median over rounds of how many times as long as its peer an arm takes."""
    return statistics.median(a / b for a, b in zip(seconds[arm], seconds[peer], strict=True))


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, the device's queue empty before and after."""
    _synchronize(device)
    started = time.perf_counter()
    work()
    _synchronize(device)
    return time.perf_counter() - started


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
