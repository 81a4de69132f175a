"""What a machine is, and how fast it multiplies matrices."""

from __future__ import annotations

import platform
import statistics
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from qdora.benchmark.measure import Arm, timed

GEMM_SIDE = {"cpu": 2048, "cuda": 8192}
"""Side of the square product whose rate counts as the machine's."""


PACKAGES = ("torch", "bitsandbytes", "peft", "transformers")


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


def facts(device: torch.device) -> dict[str, Any]:
    """Names and versions that a figure depends on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "versions": {
            package: version(package) for package in ("torch", "bitsandbytes", "peft", "transformers")
        },
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
