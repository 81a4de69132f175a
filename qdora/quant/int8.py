"""Frozen weights in 8 bits, block by block (arXiv:2110.02861 §2), by bitsandbytes' kernels."""

from __future__ import annotations

import torch

from qdora.quant.blockwise import BlockwiseWeight, code_book


class Int8Weight(BlockwiseWeight):
    """A frozen (out, in) weight as 8-bit codes of bitsandbytes' dynamic code book, a scale for each block.

    Not the 8 bits of LLM.int8(), which quantizes the inputs too.
    """

    quantization = "int8"
    codes_per_byte = 1

    def quantize_block_values(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `BlockwiseWeight.quantize_block_values`, a code a byte."""
        codes, scales = torch.ops.bitsandbytes.quantize_blockwise(
            values, code_book(values.device), self.block_size
        )
        return codes, scales

    def dequantize_block_values(
        self, codes: torch.Tensor, scales: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype
    ) -> torch.Tensor:
        """As `BlockwiseWeight.dequantize_block_values`."""
        values: torch.Tensor = torch.ops.bitsandbytes.dequantize_blockwise(
            codes, scales, self.code_values(codes.device), self.block_size, dtype
        )
        return values.view(shape)
