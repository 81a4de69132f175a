"""What the device can do at most, and what the kernels of an adapted layer do with it.

N tokens   I in_features   O out_features   R rank
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch

from qdora.adapters import kernels
from qdora.benchmark.gpu.models import COMPUTE, STD
from qdora.benchmark.gpu.run import Figures, Setup, attempt
from qdora.benchmark.peers import dequantize, linear_4bit, timed
from qdora.quant.nf4 import NF4Weight

R = 16
SCALE = 2.0


def ceilings(setup: Setup, figures: Figures) -> None:
    """The rates of a large copy, read and write counted, and of a large bf16 product."""
    size, device = setup.size, setup.device
    timer = Timer(setup)
    source = torch.randn(size.copy_bytes // 4, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(size.gemm_side, size.gemm_side, device=device, dtype=COMPUTE) for _ in range(2))
    out = torch.empty_like(a)
    figures["copy, bytes/s"] = 2 * size.copy_bytes / timer.seconds(lambda: target.copy_(source))
    figures["bf16 product, flop/s"] = 2 * size.gemm_side**3 / timer.seconds(lambda: torch.mm(a, b, out=out))


def kernel_times(setup: Setup, figures: Figures) -> None:
    """Each kernel at each shape of the model, beside bitsandbytes' dequantization and torch's operators."""
    rows = figures["kernels"] = []
    timer = Timer(setup)
    for shape in setup.size.shapes:
        for name, (work, moved) in _works(setup, shape).items():
            setup.clock.check()
            with attempt(figures, f"{name} {shape}"):
                seconds = timer.seconds(work)
                rows.append(
                    {
                        "shape": f"{shape[0]}x{shape[1]}",
                        "kernel": name,
                        "ms": 1e3 * seconds,
                        "TB/s": moved / seconds / 1e12,
                    }
                )


def _works(setup: Setup, shape: tuple[int, int]) -> Mapping[str, tuple[Callable[[], object], int]]:
    """What is timed at a shape, and the fewest bytes that it moves."""
    outputs, inputs = shape
    device, tokens = setup.device, setup.size.tokens
    torch.manual_seed(0)
    w_OI = torch.randn(shape, device=device, dtype=COMPUTE) * STD
    stored = NF4Weight.from_dense(w_OI).stored()
    theirs = linear_4bit(w_OI, COMPUTE)
    a_RI, b_OR = (torch.randn(s, device=device, dtype=COMPUTE) * STD for s in ((R, inputs), (outputs, R)))
    s_O = torch.rand(outputs, device=device) + 0.5
    x_NI, g_NO, y_NO, h_NR = (
        torch.randn(tokens, n, device=device, dtype=COMPUTE) for n in (inputs, outputs, outputs, R)
    )
    sums = 4 * tokens * outputs + 2 * tokens * R + 4 * (R + 1) * outputs
    # Half a byte a code, one a block of 64 and four a block of 256 of those; the factors once.
    read = outputs * inputs // 2 + outputs * inputs // 64 + 2 * R * (outputs + inputs)
    written = 2 * outputs * inputs
    all_rows = slice(0, outputs)
    factors: Any = {"a_RI": a_RI, "b_OR": b_OR, "scale": SCALE}
    return {
        "tile s(W + cBA)": (
            lambda: kernels.adapted_tile(stored, all_rows, COMPUTE, s_O=s_O, **factors),
            read + written,
        ),
        "tile W": (lambda: kernels.adapted_tile(stored, all_rows, COMPUTE), read + written),
        "bitsandbytes W": (lambda: dequantize(theirs, COMPUTE), read + written),
        "row_norm": (lambda: kernels.row_norm(stored, **factors), read),
        "row_scale": (
            lambda: kernels.row_scale(s_O, s_O, s_O, b_OR, 1.8, COMPUTE),
            20 * outputs + 4 * R * outputs,
        ),
        "output_gradients": (lambda: kernels.output_gradients(g_NO, y_NO, s_O, h_NR, s_O, SCALE), sums),
        "torch output_gradients": (
            lambda: (
                torch.linalg.vecdot(g_NO.float(), y_NO.float(), dim=0),
                (h_NR.T @ g_NO).T * s_O[:, None],
            ),
            sums,
        ),
        "product x W": (lambda: torch.mm(x_NI, w_OI.T), 2 * tokens * (inputs + outputs) + written),
    }


class Timer:
    """Times of single kernels: medians, with caches that hold nothing of the last call."""

    def __init__(self, setup: Setup) -> None:
        self._device, self._repeats = setup.device, setup.size.repeats
        self._flush = torch.empty(setup.size.flush_bytes, dtype=torch.uint8, device=setup.device)

    def seconds(self, work: Callable[[], object]) -> float:
        """Median seconds of one call on the device, after two calls that compile and load."""
        for _ in range(2):
            work()
        if self._device.type != "cuda":
            return statistics.median(timed(work, self._device) for _ in range(self._repeats))
        events = []
        for _ in range(self._repeats):
            # Long enough that the host has issued all of the call when the device comes to it.
            self._flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize(self._device)
        return statistics.median(float(start.elapsed_time(end)) for start, end in events) / 1e3
