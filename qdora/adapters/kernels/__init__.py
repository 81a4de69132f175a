"""Kernels of the adapted layer, each one pass over what it reads; where there is no Triton, torch computes.

    N tokens   O out_features   I in_features   R rank

Factors and vectors are full, not sharded; none of the three has a gradient.
"""

from __future__ import annotations

import torch

from qdora.adapters.kernels import ops
from qdora.quant.base import StoredWeight

available = ops.available
_tile = torch.ops.qdora.adapted_tile.default
_norm = torch.ops.qdora.row_norm.default
_dot = torch.ops.qdora.column_dot.default


def adapted_tile(
    weight: StoredWeight,
    rows: slice,
    dtype: torch.dtype,
    *,
    s_O: torch.Tensor | None = None,
    a_RI: torch.Tensor | None = None,
    b_OR: torch.Tensor | None = None,
    scale: float = 1.0,
) -> torch.Tensor:
    """Rows of s ∘ (W + c B A), in at least float32 and rounded once.

    Without s and B A bit-equal to bitsandbytes' dequantization.

    Args:
        rows: with start and stop, within the weight.
        dtype: of the result.
        s_O: (O,) at least float32; None, meaning ones.
        a_RI, b_OR: both, or neither; may be strided views.
        scale: c.
    Returns: (rows, I) in `dtype`.
    """
    tile: torch.Tensor = _tile(*weight, rows.start, rows.stop, dtype, s_O, a_RI, b_OR, scale)
    return tile


def row_norm(
    weight: StoredWeight,
    a_RI: torch.Tensor | None = None,
    b_OR: torch.Tensor | None = None,
    scale: float = 1.0,
) -> torch.Tensor:
    """||W + c B A|| of each row, at least the root of the smallest normal number, since it divides.

    The same bits at every call, and with B = 0 those of ||W||.

    Args: as of `adapted_tile`.
    Returns: (O,) float32; float64 where an operand is.
    """
    norm_O: torch.Tensor = _norm(*weight, a_RI, b_OR, scale)
    return norm_O


def column_dot(g_NO: torch.Tensor, y_NO: torch.Tensor) -> torch.Tensor:
    """Σ_N g ∘ y, the same bits at every call.

    Args:
        g_NO, y_NO: (N, O) floating point.
    Returns: (O,) float32; float64 where an operand is.
    """
    total_O: torch.Tensor = _dot(g_NO, y_NO)
    return total_O
