"""Study formats: frozen weights in 3- and 2-bit NormalFloat, by QLoRA's construction (arXiv:2305.14314 §3).

They answer how a model fares with fewer bits, and save no memory: a code takes a byte, though it holds three
bits or two.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import ClassVar

import torch

from qdora.quant.blockwise import CODE_BOOK, code_values, without_modes
from qdora.quant.int8 import Int8Weight

_SMALLEST = 1e-38
"""In place of the scale of a block of zeros."""


def normal_float(bits: int) -> tuple[float, ...]:
    """The 2^bits values of NormalFloat, ascending from -1 to 1, zero among them.

    Quantiles of a normal distribution: 2^(bits - 1) of its positive half and one less of its negative half,
    equally spaced in probability between 1/2 and 1 - δ, all divided by the largest.

    Source: QLoRA, arXiv:2305.14314 §3; δ = (1 / 2n + 1 / (2n - 2)) / 2 for n codes, arXiv:2306.06965.
    """
    codes = 2**bits
    outermost = 1 - (1 / (2 * codes) + 1 / (2 * codes - 2)) / 2

    def quantiles(count: int) -> list[float]:
        step = (outermost - 0.5) / count
        return [NormalDist().inv_cdf(0.5 + step * i) for i in range(1, count + 1)]

    positive, negative = quantiles(codes // 2), quantiles(codes // 2 - 1)
    values = [*(-value for value in reversed(negative)), 0.0, *positive]
    return tuple(value / positive[-1] for value in values)


class NF3Weight(Int8Weight):
    """A frozen (out, in) weight in 3-bit NormalFloat, a code a byte: kernels read it as they read `int8`.

    Attributes:
        bits: of information in a code.
    """

    quantization = "nf3"
    bits: ClassVar[int] = 3

    def quantize_block_values(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `BlockwiseWeight.quantize_block_values`, a code a byte."""
        values, block_size = values.float(), self.block_size
        blocks = torch.nn.functional.pad(values, (0, -values.numel() % block_size)).view(-1, block_size)
        scales = blocks.abs().amax(dim=1)
        scaled = (blocks / scales.clamp(min=_SMALLEST)[:, None]).view(-1)[: values.numel()]
        table = self.code_values(values.device)[: 2**self.bits]
        codes = torch.bucketize(scaled, (table[1:] + table[:-1]) / 2, out_int32=True)
        return codes.to(torch.uint8), scales

    def code_values(self, device: torch.device) -> torch.Tensor:
        """As `BlockwiseWeight.code_values`; zeros after the codes that there are."""
        return code_values(self.quantization, device, self._make_table)

    def _make_table(self) -> torch.Tensor:
        values = normal_float(self.bits)
        return without_modes(lambda: torch.tensor([*values, *[0.0] * (CODE_BOOK - len(values))]))


class NF2Weight(NF3Weight):
    """A frozen (out, in) weight in 2-bit NormalFloat, a code a byte."""

    quantization = "nf2"
    bits = 2
