"""Time arms against each other, in one process and alternating; the machine that a figure belongs to."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tqdm import tqdm

from qdora.run import machine, package_versions

Arm = Callable[[], float]
"""Does its work once; returns the seconds of the part that counts."""

GEMM_SIDE = {"cpu": 2048, "cuda": 8192}
"""Side of the square product whose rate counts as the machine's."""


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


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Median over rounds of each arm's seconds."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def ratio(seconds: Mapping[str, Sequence[float]], arm: str, peer: str) -> float:
    """The median over rounds of how many times as long as its peer an arm takes."""
    return statistics.median(a / b for a, b in zip(seconds[arm], seconds[peer], strict=True))


def ratios(seconds: Mapping[str, Sequence[float]], pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """`ratio` of each pair of an arm and its peer, as plain values."""
    return [{"arm": arm, "peer": peer, "ratio": ratio(seconds, arm, peer)} for arm, peer in pairs]


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, the device synchronized before and after."""
    _synchronize(device)
    started = time.perf_counter()
    work()
    _synchronize(device)
    return time.perf_counter() - started


def square_product(dtype: torch.dtype, device: torch.device) -> tuple[Arm, int]:
    """A large square product whose rate counts as the machine's, and its flops."""
    side = GEMM_SIDE[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: timed(lambda: torch.mm(a, b, out=out), device), 2 * side**3


def gemm_rate(dtype: torch.dtype, device: torch.device, rounds: int = 9) -> float:
    """Flops a second of the machine, the median of some rounds."""
    product, flops = square_product(dtype, device)
    return flops / statistics.median(product() for _ in range(rounds))


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Names and versions that a figure depends on."""
    here = machine()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else here["processor"],
        "threads": here["threads"],
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "versions": package_versions("peft"),
    }


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
