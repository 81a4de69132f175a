"""A frozen weight in 4-bit NormalFloat (QLoRA, arXiv:2305.14314 §3), by bitsandbytes' kernels.

The module owns its packed bytes and its statistics.  bitsandbytes' own parameter class
repacks the bytes on some CPUs and loses the statistics when the parameter is sharded.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from qdora.quant.nf4_quantize import ABSMAX_BLOCK, NF4Parts, block_count, check_even, quantize_share
from qdora.quant.weight import align_rows, rows_per_tile

CODE_BOOK = 256
"""Entries of the code book of the second quantization."""


class NF4Weight(nn.Module):
    """A frozen (out, in) weight as NF4 codes and block scales.

    Attributes:
        packed: (out, in / 2) uint8, two codes a byte, the flattened matrix in row order.
        absmax: (out * in / block,) block scales; uint8 codes where doubly quantized, else float32.  A
            parameter, so that it is sharded with the codes.
        nested_absmax, nested_code, offset: the statistics of the second quantization, or None.
        block_size: weights that share one scale.
    """

    packed: nn.Parameter
    absmax: nn.Parameter
    nested_absmax: torch.Tensor | None
    nested_code: torch.Tensor | None
    offset: torch.Tensor | None

    def __init__(
        self,
        packed: torch.Tensor,
        absmax: torch.Tensor,
        shape: tuple[int, int],
        *,
        block_size: int = 64,
        nested_absmax: torch.Tensor | None = None,
        nested_code: torch.Tensor | None = None,
        offset: torch.Tensor | None = None,
        nested_block_size: int = ABSMAX_BLOCK,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        check_even(self.in_features)
        self.block_size = block_size
        self.nested_block_size = nested_block_size
        self.packed = nn.Parameter(packed.view(self.out_features, self.in_features // 2), requires_grad=False)
        self.absmax = nn.Parameter(absmax, requires_grad=False)
        self.register_buffer("nested_absmax", nested_absmax)
        self.register_buffer("nested_code", nested_code)
        self.register_buffer("offset", offset)

    @classmethod
    def quantize(
        cls, w_OI: torch.Tensor, *, block_size: int = 64, double_quantization: bool = True
    ) -> NF4Weight:
        """Quantize a floating-point weight, on its own device.

        Args:
            w_OI: (out, in), in even.
        Raises: ValueError: `in` is odd.
        """
        shape = (w_OI.shape[0], w_OI.shape[1])
        parts = quantize_share(w_OI, shape, block_size=block_size, double_quantization=double_quantization)
        return cls.of_parts(parts, shape, block_size=block_size)

    @classmethod
    def of_parts(
        cls,
        parts: NF4Parts,
        shape: tuple[int, int],
        *,
        block_size: int,
        nested_block_size: int = ABSMAX_BLOCK,
    ) -> NF4Weight:
        """The whole weight from its parts, which are taken over, not copied."""
        return cls(
            parts.packed,
            parts.absmax,
            shape,
            block_size=block_size,
            nested_absmax=parts.nested_absmax,
            nested_code=parts.nested_code,
            offset=parts.offset,
            nested_block_size=nested_block_size,
        )

    @classmethod
    def on_meta(
        cls,
        shape: tuple[int, int],
        *,
        block_size: int,
        double_quantization: bool,
        nested_block_size: int = ABSMAX_BLOCK,
    ) -> NF4Weight:
        """The same layer without its bytes, which `fill` puts in place.

        Raises: ValueError: `in` is odd.
        """
        check_even(shape[1])
        blocks = block_count(shape, block_size)
        packed = torch.empty(shape[0], shape[1] // 2, dtype=torch.uint8, device="meta")
        absmax = torch.empty(
            blocks, dtype=torch.uint8 if double_quantization else torch.float32, device="meta"
        )
        nested: dict[str, torch.Tensor] = {}
        if double_quantization:
            nested = {
                "nested_absmax": torch.empty(-(-blocks // nested_block_size), device="meta"),
                "nested_code": torch.empty(CODE_BOOK, device="meta"),
                "offset": torch.empty((), device="meta"),
            }
        return cls(
            packed, absmax, shape, block_size=block_size, nested_block_size=nested_block_size, **nested
        )

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def norm_dtype(self) -> torch.dtype:
        return torch.float32

    def scales(self) -> torch.Tensor:
        """(out * in / block,) float32 block scales."""
        if self.nested_absmax is None or self.offset is None:
            return self.absmax.detach()
        scales: torch.Tensor = torch.ops.bitsandbytes.dequantize_blockwise(
            self.absmax.detach(), self.nested_absmax, self.nested_code, self.nested_block_size, torch.float32
        )
        return scales.add_(self.offset)

    def tiles(
        self, dtype: torch.dtype, s_O: torch.Tensor | None = None
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """As `FrozenWeight.tiles`, dequantized."""
        scales = self.scales()
        if s_O is not None and self.in_features % self.block_size == 0:
            # Rows of whole blocks: to scale the blocks' scales is to scale the rows.
            scales = (scales.view(self.out_features, -1) * s_O[:, None]).view(-1)
            s_O = None
        packed_flat = self.packed.detach().view(-1)
        wanted = rows_per_tile(self.out_features, self.in_features, dtype, self.device)
        step = align_rows(wanted, self.in_features, self.block_size)
        for start in range(0, self.out_features, step):
            stop = min(start + step, self.out_features)
            w_tile = self._dequantize(packed_flat, scales, start, stop, dtype)
            yield slice(start, stop), w_tile if s_O is None else (w_tile * s_O[start:stop, None]).to(dtype)

    def _dequantize(
        self, packed_flat: torch.Tensor, scales: torch.Tensor, start: int, stop: int, dtype: torch.dtype
    ) -> torch.Tensor:
        first, last = start * self.in_features, stop * self.in_features
        # The kernels know three dtypes; float64 serves the exactness tests only.
        kernel_dtype = torch.float32 if dtype == torch.float64 else dtype
        w_tile: torch.Tensor = torch.ops.bitsandbytes.dequantize_4bit(
            packed_flat[first // 2 : last // 2],
            scales[first // self.block_size : -(-last // self.block_size)],
            self.block_size,
            "nf4",
            self._kernel_shape(last - first),
            kernel_dtype,
        )
        return w_tile.view(stop - start, self.in_features).to(dtype)

    def _kernel_shape(self, values: int) -> tuple[int, int]:
        """A shape whose rows are whole blocks: the kernel for AVX512 takes wrong scales for any other."""
        if self.in_features % self.block_size == 0:
            return values // self.in_features, self.in_features
        if values % self.block_size == 0:
            return values // self.block_size, self.block_size
        return 1, values

    def extra_repr(self) -> str:
        double = "double" if self.nested_absmax is not None else "single"
        return f"{self.out_features}x{self.in_features}, nf4, block {self.block_size}, {double} quantization"
