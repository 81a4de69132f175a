"""Frozen weights in 4-bit NormalFloat (QLoRA, arXiv:2305.14314 §3), by bitsandbytes' kernels.

On a CPU bitsandbytes quantizes by a binary search for each value, which was most of the time in which a model
loads; here it is a lookup in a table, ten times as fast, with the same codes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch

from qdora.quant.blockwise import BlockwiseWeight, code_values, without_modes

_BINS = 2048
"""Equal intervals between 0 and 1, few enough for a core's first cache; two bounds are five bins apart."""
_SMALLEST = 1e-38
"""In place of the scale of a block of zeros, as bitsandbytes has it."""


class NF4Weight(BlockwiseWeight):
    """A frozen (out, in) weight in 4-bit NormalFloat; in even.  Two codes a byte."""

    quantization = "nf4"
    codes_per_byte = 2

    def quantize_block_values(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `BlockwiseWeight.quantize_block_values`, two codes a byte."""
        if values.device.type == "cpu" and type(values) is torch.Tensor:
            return _quantize(values.float(), self.block_size, self.quantization)
        codes, scales = torch.ops.bitsandbytes.quantize_4bit(
            values, self.block_size, self.quantization, torch.uint8
        )
        return codes, scales

    def dequantize_block_values(
        self, codes: torch.Tensor, scales: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype
    ) -> torch.Tensor:
        """As `BlockwiseWeight.dequantize_block_values`."""
        values: torch.Tensor = torch.ops.bitsandbytes.dequantize_4bit(
            codes, scales, self.block_size, self.quantization, shape, dtype
        )
        return values

    def scaled_product(
        self, s_O: torch.Tensor | None = None
    ) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """As `FrozenWeight.scaled_product`, by bitsandbytes' `gemm_4bit`, with s in the blocks' scales."""
        if not has_gemm(self.device) or self.in_features % self.block_size:
            return None
        scales, shape = self.scales(), [self.out_features, self.in_features]
        if s_O is not None:
            scales = (scales.view(self.out_features, -1) * s_O[:, None]).view(-1)
        codes = self.packed.detach().view(-1, 1)

        def product(x_NI: torch.Tensor) -> torch.Tensor:
            y_NO: torch.Tensor = torch.ops.bitsandbytes.gemm_4bit(
                x_NI, codes, shape, scales, self.block_size, self.quantization
            )
            return y_NO

        return product


def has_gemm(device: torch.device) -> bool:
    """Whether bitsandbytes multiplies by 4-bit codes on a device; elsewhere it dequantizes them first."""
    return device.type == "cuda"


class _Lookup(NamedTuple):
    """Bins of the scaled values, by which a value is at most one comparison from its code.

    Attributes:
        below: (bins,) uint8, how many of the 15 bounds between neighbouring codes lie below the bin.
        bound: (bins,) the bound that is in the bin or at its edge; infinite where none is.
        order: (16,) uint8, the codes by their values; None where they are in order.
    """

    below: torch.Tensor
    bound: torch.Tensor
    order: torch.Tensor | None


@cache
def _lookup(quantization: str) -> _Lookup:
    return without_modes(lambda: _make_lookup(quantization))


def _make_lookup(quantization: str) -> _Lookup:
    code = code_values(quantization, torch.device("cpu"))
    order = torch.argsort(code)
    bounds = (code[order[:-1]] + code[order[1:]]) / 2
    bins = _bin_of(bounds)
    below = (torch.arange(2 * _BINS + 1)[:, None] > bins + 1).sum(dim=1, dtype=torch.uint8)
    bound = torch.full((2 * _BINS + 1,), torch.inf)
    for edge in (-1, 0, 1):  # the product may be rounded otherwise for a value next to the bound
        bound[bins + edge] = bounds
    in_order = torch.equal(order, torch.arange(16))
    return _Lookup(below, bound, None if in_order else order.to(torch.uint8))


def _bin_of(scaled: torch.Tensor) -> torch.Tensor:
    return (scaled * _BINS).add_(_BINS).to(torch.int32).clamp_(0, 2 * _BINS)


def _quantize(values: torch.Tensor, block_size: int, quantization: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed codes and scales, bit for bit those of bitsandbytes; for float32 values on a CPU."""
    below, bound, order = _lookup(quantization)
    full = values.numel() // block_size * block_size
    blocks = values[:full].view(-1, block_size)
    scales = blocks.abs().amax(dim=1)
    scaled = (blocks * (1.0 / scales.clamp(min=_SMALLEST))[:, None]).view(-1)
    if full < values.numel():
        last = values[full:].abs().amax().clamp(min=_SMALLEST)
        scales, scaled = torch.cat([scales, last[None]]), torch.cat([scaled, values[full:] / last])
    bins = _bin_of(scaled)
    codes = below.index_select(0, bins)
    codes += (scaled > bound.index_select(0, bins)).view(torch.uint8)
    if order is not None:
        codes = order.index_select(0, codes.int())
    first, second = codes.view(-1, 2).unbind(1)
    return (first << 4) | second, scales
