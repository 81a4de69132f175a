"""Frozen weights in 4-bit NormalFloat (QLoRA, arXiv:2305.14314 §3), by bitsandbytes' kernels."""

from __future__ import annotations

import torch

from qdora.quant.blockwise import BlockwiseWeight


class NF4Weight(BlockwiseWeight):
    """A frozen (out, in) weight in 4-bit NormalFloat; in even.  Two codes a byte."""

    quantization = "nf4"
    codes_per_byte = 2

    def quantize_block_values(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `BlockwiseWeight.quantize_block_values`, two codes a byte."""
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
