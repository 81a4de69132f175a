"""Kernels of the adapted layer, each one pass over what it reads; where there is no Triton, torch computes.

    N tokens   O out_features   I in_features   R rank

Factors and vectors are full, not sharded; none of these has a gradient.
"""

from __future__ import annotations

import torch

from qdora.adapters.kernels import native, ops, reference
from qdora.quant.base import StoredWeight

available = ops.available
_tile = torch.ops.qdora.adapted_tile.default
_norm = torch.ops.qdora.row_norm.default
_scale = torch.ops.qdora.row_scale.default
_gradients = torch.ops.qdora.output_gradients.default


def adapted_tile(
    weight: StoredWeight,
    rows: slice,
    dtype: torch.dtype,
    *,
    s_O: torch.Tensor | None = None,
    a_RI: torch.Tensor | None = None,
    b_OR: torch.Tensor | None = None,
    scale: float = 1.0,
    factor: float = 1.0,
) -> torch.Tensor:
    """Rows of f s ∘ (W + c B A), in at least float32 and rounded once.

    Without f, s and B A bit-equal to bitsandbytes' dequantization.

    Args:
        rows: with start and stop, within the weight.
        dtype: of the result.
        s_O: (O,) at least float32; None, meaning ones.
        a_RI, b_OR: both, or neither; may be strided views.
        scale: c.
        factor: f.
    Returns: (rows, I) in `dtype`.
    """
    tile: torch.Tensor = _tile(*weight, rows.start, rows.stop, dtype, s_O, a_RI, b_OR, scale, factor)
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


def row_scale(
    norm_O: torch.Tensor,
    initial_O: torch.Tensor,
    offset_O: torch.Tensor | None,
    b_OR: torch.Tensor | None,
    factor: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """What the magnitude makes of a layer's rows: m = initial + offset, s = m / norm, and f s B.

    Args:
        norm_O, initial_O: (O,) at least float32.
        offset_O: (O,); zero where None.
        b_OR: may be a strided view.
        factor: f.
        dtype: of f s B, which is rounded once.
    Returns: m and s, (O,) at least float32; (O, R), None where there is no B.
    """
    if offset_O is None:  # of a frozen magnitude, which is no more than an ablation
        m_O, s_O, b_scaled_OR = reference.row_scale(norm_O, initial_O, None, b_OR, factor, dtype)
        return m_O, s_O, None if b_OR is None else b_scaled_OR
    if dtype in native.DTYPES and native.takes((norm_O, initial_O), (offset_O, b_OR)):
        return native.row_scale(norm_O, initial_O, offset_O, b_OR, factor, dtype)
    m_O, s_O, b_scaled_OR = _scale(norm_O, initial_O, offset_O, b_OR, factor, dtype)
    return m_O, s_O, None if b_OR is None else b_scaled_OR


def output_gradients(
    g_NO: torch.Tensor,
    y_NO: torch.Tensor | None,
    m_O: torch.Tensor | None,
    h_NR: torch.Tensor | None,
    s_O: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of what follows the tokens, from one pass over g: of the magnitude and of B.

    Σ_N g ∘ u / n with u = y / s and s n = m is Σ_N g ∘ y / m; that of B is c s ∘ gᵀ h (docs/math.md §2).  The
    same bits at every call.

    Args:
        g_NO: gradient of the output, (N, O) floating point.
        y_NO, m_O: the output before its bias, and the magnitude; None where there is none.
        h_NR: A x; None where B is not trained.
        s_O: (O,) at least float32; ones where None.
        scale: c.
    Returns: (O,) and (O, R) in float32, float64 where an operand is; None for what was not asked for.
    """
    if (
        y_NO is not None
        and m_O is not None
        and y_NO.dtype == g_NO.dtype
        and native.takes((m_O,), (g_NO, y_NO))
    ):
        grad_OR = None if h_NR is None else reference.output_gradients(g_NO, None, None, h_NR, s_O, scale)[1]
        return native.magnitude_gradient(g_NO, y_NO, m_O), grad_OR
    grad_O, grad_OR = _gradients(g_NO, y_NO, m_O, h_NR, s_O, scale)
    return None if y_NO is None else grad_O, None if h_NR is None else grad_OR
