"""A frozen weight in its checkpoint's floating-point dtype."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

import torch
from torch import nn

from qdora.quant.base import FrozenWeight, GatherRows, Shard, StoredWeight, rows_per_tile


class DenseWeight(FrozenWeight):
    """A frozen (out, in) weight that is widened tile by tile to the compute dtype.

    Args:
        w_OI: floating point; kept as it is, 16 bits stay 16 bits.  A parameter is shared, not copied.
    """

    quantization = "none"

    def __init__(self, w_OI: torch.Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = w_OI.shape
        self.weight = w_OI if isinstance(w_OI, nn.Parameter) else nn.Parameter(w_OI, requires_grad=False)

    @classmethod
    def on_meta(
        cls, shape: tuple[int, int], *, dtype: torch.dtype, block_size: int, double_quantization: bool
    ) -> Self:
        """As `FrozenWeight.on_meta`; there is nothing to quantize."""
        return cls(torch.empty(shape, dtype=dtype, device="meta"))

    @property
    def norm_dtype(self) -> torch.dtype:
        """Float32, and float64 for a float64 weight."""
        return torch.promote_types(self.weight.dtype, torch.float32)

    @property
    def trained(self) -> nn.Parameter | None:
        """The weight, in full fine-tuning."""
        return self.weight if self.weight.requires_grad else None

    def tiles(
        self, dtype: torch.dtype, s_O: torch.Tensor | None = None
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """As `FrozenWeight.tiles`; the weight itself, in one tile, where it is what was asked for."""
        w_OI = self.weight.detach()
        if w_OI.dtype == dtype and s_O is None:
            yield slice(0, self.out_features), w_OI
            return
        step = rows_per_tile(self.out_features, self.in_features, dtype, w_OI.device)
        for start in range(0, self.out_features, step):
            rows = slice(start, min(start + step, self.out_features))
            yield rows, w_OI[rows].to(dtype) if s_O is None else (w_OI[rows] * s_O[rows, None]).to(dtype)

    def stored(self) -> StoredWeight:
        """As `FrozenWeight.stored`, the values alone."""
        return StoredWeight(self.weight.detach().contiguous())

    def rows_to_read(self, shard: Shard) -> slice:
        """The shard's own rows."""
        return shard.rows(self.out_features)

    def from_rows(self, w_RI: torch.Tensor, shard: Shard, gather: GatherRows) -> dict[str, torch.Tensor]:
        """The rows, in the dtype of the weight."""
        return {"weight": w_RI.to(self.weight.dtype)}

    def extra_repr(self) -> str:
        """Shape and dtype, for printing."""
        return f"{self.out_features}x{self.in_features}, {self.weight.dtype}"
