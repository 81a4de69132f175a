"""A frozen weight in its checkpoint's floating-point dtype."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from qdora.quant.weight import rows_per_tile


class DenseWeight(nn.Module):
    """A frozen (out, in) weight that is widened tile by tile to the compute dtype.

    Args:
        w_OI: floating point; kept as it is, 16 bits stay 16 bits.
    """

    def __init__(self, w_OI: torch.Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = w_OI.shape
        self.weight = w_OI if isinstance(w_OI, nn.Parameter) else nn.Parameter(w_OI, requires_grad=False)

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def norm_dtype(self) -> torch.dtype:
        return torch.promote_types(self.weight.dtype, torch.float32)

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

    def extra_repr(self) -> str:
        return f"{self.out_features}x{self.in_features}, {self.weight.dtype}"
