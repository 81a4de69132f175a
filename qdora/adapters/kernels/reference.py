"""What the kernels compute, by torch's operators alone: on a CPU, and where a GPU has no Triton.

In float32, or in float64 where an operand is; arguments and results as in `qdora.adapters.kernels`.
"""

from __future__ import annotations

import torch

from qdora.quant.base import StoredWeight, codes_per_byte, rows_per_tile


def wide_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """Float64 where a tensor is in float64, else float32."""
    has_double = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if has_double else torch.float32


def dequantized_rows(weight: StoredWeight, first: int, last: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows `first` to `last` of W, (last - first, I)."""
    values, absmax = weight.values[first:last], weight.absmax
    if weight.table is None or absmax is None:
        return values.to(dtype, copy=True)
    if codes_per_byte(weight.table) == 2:
        values = torch.stack((values >> 4, values & 15), dim=-1).view(values.shape[0], -1)
    inputs = values.shape[1]
    block = torch.arange(first * inputs, last * inputs, device=values.device) // weight.block_size
    scales = absmax[block]
    if weight.nested_absmax is not None and weight.nested_code is not None and weight.offset is not None:
        nested = weight.nested_absmax[block // weight.nested_block_size]
        scales = weight.nested_code[scales.int()] * nested + weight.offset
    return (weight.table[values.int()] * scales.view_as(values)).to(dtype)


def updated_rows(
    weight: StoredWeight,
    first: int,
    last: int,
    dtype: torch.dtype,
    a_RI: torch.Tensor | None,
    b_OR: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """Rows of W + c B A, (last - first, I)."""
    w_tile = dequantized_rows(weight, first, last, dtype)
    if a_RI is not None and b_OR is not None:
        w_tile.addmm_(b_OR[first:last].to(dtype), a_RI.to(dtype), alpha=scale)
    return w_tile


def adapted_tile(
    weight: StoredWeight,
    first: int,
    last: int,
    dtype: torch.dtype,
    s_O: torch.Tensor | None,
    a_RI: torch.Tensor | None,
    b_OR: torch.Tensor | None,
    scale: float,
    factor: float,
) -> torch.Tensor:
    """Rows `first` to `last` of f s ∘ (W + c B A)."""
    wide = torch.promote_types(dtype, wide_dtype(weight.values, s_O, a_RI, b_OR))
    tile = updated_rows(weight, first, last, wide, a_RI, b_OR, scale)
    if s_O is not None:
        tile *= (s_O[first:last] * factor)[:, None]
    elif factor != 1:
        tile *= factor
    return tile.to(dtype)


def row_norm(
    weight: StoredWeight, a_RI: torch.Tensor | None, b_OR: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """||W + c B A|| of each row."""
    wide = wide_dtype(weight.values, a_RI, b_OR)
    rows, inputs = weight.shape
    norm_O = torch.empty(rows, dtype=wide, device=weight.values.device)
    step = rows_per_tile(rows, inputs, wide, norm_O.device)
    for first in range(0, rows, step):
        last = min(rows, first + step)
        tile = updated_rows(weight, first, last, wide, a_RI, b_OR, scale)
        torch.linalg.vector_norm(tile, dim=1, out=norm_O[first:last])
    return norm_O.clamp_min_(torch.finfo(wide).tiny ** 0.5)


def row_scale(
    norm_O: torch.Tensor,
    initial_O: torch.Tensor,
    offset_O: torch.Tensor | None,
    b_OR: torch.Tensor | None,
    factor: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """m, s and f s B."""
    m_O = initial_O if offset_O is None else initial_O + offset_O
    s_O = m_O / norm_O
    if b_OR is None:
        return m_O, s_O, s_O.new_empty(0, dtype=dtype)
    scale_O = s_O if factor == 1 else s_O * factor
    return m_O, s_O, (b_OR * scale_O[:, None]).to(dtype)


def output_gradients(
    g_NO: torch.Tensor,
    y_NO: torch.Tensor | None,
    m_O: torch.Tensor | None,
    h_NR: torch.Tensor | None,
    s_O: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ_N g ∘ y / m, and c s ∘ gᵀ h."""
    wide = wide_dtype(g_NO, y_NO, m_O, s_O)
    grad_O, grad_OR = (g_NO.new_empty(0, dtype=wide) for _ in range(2))
    if y_NO is not None and m_O is not None:
        # A magnitude of exactly 0 has y = 0: the least number makes its gradient 0 instead of 0/0.
        grad_O = _column_dot(g_NO, y_NO, wide) / (m_O + torch.finfo(m_O.dtype).tiny)
    if h_NR is not None:
        # (hᵀ g)ᵀ: on CPUs the faster way round where O is the long side.
        grad_RO = torch.addmm(g_NO.new_empty(()), h_NR.T, g_NO, beta=0, alpha=scale)
        grad_OR = g_NO.new_empty(grad_RO.T.shape, dtype=wide)
        if s_O is None:
            grad_OR.copy_(grad_RO.T)
        else:
            torch.mul(grad_RO.T, s_O[:, None], out=grad_OR)
    return grad_O, grad_OR


def _column_dot(g_NO: torch.Tensor, y_NO: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
    """Σ_N g ∘ y, its products held for one tile of tokens at a time."""
    total_O = torch.zeros(g_NO.shape[1], dtype=wide, device=g_NO.device)
    step = rows_per_tile(max(1, g_NO.shape[0]), max(1, g_NO.shape[1]), wide, g_NO.device)
    for g_tile, y_tile in zip(g_NO.split(step), y_NO.split(step), strict=True):
        total_O += torch.linalg.vecdot(g_tile.to(wide), y_tile.to(wide), dim=0)
    return total_O
