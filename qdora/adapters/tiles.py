"""Row tiles of the adapted weight s ∘ (W + c B A), and the products that see W as nothing else.

N tokens   I in_features   O out_features   R rank
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from qdora.adapters import kernels
from qdora.adapters.base import Factors
from qdora.adapters.kernels import native
from qdora.quant.base import FrozenWeight, rows_per_tile

OFF_GRID = 1.841
"""Factor of a 16-bit tile that moves with training, taken back inside the product.

W from a 16-bit checkpoint stands on the grid of its dtype, where s W with s = 1 + 1e-3 rounds back to W; so
do the largest weights of a block of NF4, which are its scale.  Off the grid as many elements round up as s
asks for.  Of the factors between 1 and 2 this one keeps moves of 1e-4 to 1e-3 best: within 11% in one
direction, within 4% where half of the rows move up and half down, over all 128 fractions of bf16.
"""
SIXTEEN_BIT_TILES = 4
"""A tile of 16 bits on a CPU has so many times the rows of another: each product in 16 bits repacks x."""


def has_kernels(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernels compute in a dtype on a device."""
    return dtype.itemsize <= 4 and kernels.available(device)


def has_native_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 in units of its own; elsewhere that is slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def scales_output(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether s scales the finished product instead of the tile, so that it need not be known before.

    That is faster on a CPU, and in float32 a second rounding does not matter.
    """
    return dtype.itemsize >= 4 and not has_kernels(dtype, device)


def adapted_tiles(
    weight: FrozenWeight,
    dtype: torch.dtype,
    s_O: torch.Tensor | None = None,
    update: Factors | None = None,
    factor: float = 1.0,
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Row tiles of f s ∘ (W + c B A), each rounded to `dtype` once; as `FrozenWeight.tiles`.

    Args:
        s_O: (O,) at least float32; ones where None.
        update: with matrices alone; only where there are kernels.
        factor: f; other than 1 only with s or an update.
    """
    stored = weight.stored() if has_kernels(dtype, weight.device) else None
    if stored is None or (stored.table is None and s_O is None and update is None):
        assert update is None
        yield from _tiles_without_kernels(weight, dtype, s_O, factor)
        return
    a_RI, b_OR, scale = (None, None, 1.0) if update is None else (update.a_RI, update.b_OR, update.scale)
    step = rows_per_tile(weight.out_features, weight.in_features, dtype, weight.device)
    for start in range(0, weight.out_features, step):
        rows = slice(start, min(start + step, weight.out_features))
        yield (
            rows,
            kernels.adapted_tile(
                stored, rows, dtype, s_O=s_O, a_RI=a_RI, b_OR=b_OR, scale=scale, factor=factor
            ),
        )


def _tiles_without_kernels(
    weight: FrozenWeight, dtype: torch.dtype, s_O: torch.Tensor | None, factor: float
) -> Iterator[tuple[slice, torch.Tensor]]:
    stored = weight.stored() if dtype in native.DTYPES else None
    if stored is None or stored.table is None or not native.takes((s_O, stored.table), codes=[stored.values]):
        yield from weight.tiles(dtype, s_O if s_O is None or factor == 1 else s_O * factor)
        return
    step = rows_per_tile(weight.out_features, weight.in_features, dtype, weight.device)
    if dtype.itemsize < 4:
        step = min(weight.out_features, SIXTEEN_BIT_TILES * step)
    # One for all tiles, which stays in the caches.
    tile = torch.empty(step, weight.in_features, dtype=dtype)
    for start in range(0, weight.out_features, step):
        rows = slice(start, min(start + step, weight.out_features))
        native.write_tile(tile[: rows.stop - start], stored, start, rows.stop, s_O, factor)
        yield rows, tile[: rows.stop - start]


def product(
    x_NI: torch.Tensor,
    w_tiles: Iterator[tuple[slice, torch.Tensor]],
    out_features: int,
    *,
    onto_NO: torch.Tensor | None,
    alpha: float,
    a_RI: torch.Tensor | None,
    bf16_operands: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """alpha x Wᵀ added onto a tensor, which becomes the result, and W Aᵀ, in one pass over W.

    Args:
        x_NI: (N, I).
        w_tiles: of W, (O, I), in the dtype of x.
        onto_NO: (N, O), overwritten; None, meaning zeros.
        a_RI: (R, I); None where W Aᵀ is not asked for.
        bf16_operands: round float32 operands of x Wᵀ, on a CPU.
    Returns: (N, O) in the dtype of x; (O, R), never of rounded operands, or None.
    """
    y_NO = x_NI.new_empty(x_NI.shape[0], out_features) if onto_NO is None else onto_NO
    beta = 0 if onto_NO is None else 1
    wa_OR = None if a_RI is None else x_NI.new_empty(out_features, a_RI.shape[0])
    for rows, w_tile in w_tiles:
        if a_RI is not None and wa_OR is not None:
            # First, while the fresh tile is still in the cores' own caches.
            torch.mm(w_tile, a_RI.T, out=wa_OR[rows])
        with _bf16_operands() if bf16_operands else nullcontext():
            y_NO[:, rows].addmm_(x_NI, w_tile.T, beta=beta, alpha=alpha)
    return y_NO, wa_OR


def product_transposed(
    g_NO: torch.Tensor,
    w_tiles: Iterator[tuple[slice, torch.Tensor]],
    *,
    onto_NI: torch.Tensor | None,
    alpha: float,
    bf16_operands: bool,
) -> torch.Tensor:
    """alpha g W added onto a tensor, the sum over tiles in at least float32.

    Args:
        g_NO: (N, O).
        w_tiles, bf16_operands: as of `product`.
        onto_NI: (N, I), overwritten; None, meaning zeros.
    Returns: (N, I) in the dtype of g.
    """
    wide = torch.promote_types(g_NO.dtype, torch.float32)
    total_NI = onto_NI
    with _bf16_operands() if bf16_operands else nullcontext():
        for i, (rows, w_tile) in enumerate(w_tiles):
            part_NO = g_NO[:, rows]
            if total_NI is None:
                total_NI = mm_scaled(part_NO, w_tile, alpha)
            elif i == 0 or g_NO.dtype == wide:
                total_NI.addmm_(part_NO, w_tile, alpha=alpha)
            else:
                total_NI = total_NI.to(wide).add_(part_NO @ w_tile, alpha=alpha)
    assert total_NI is not None
    return total_NI.to(g_NO.dtype)


def mm_scaled(left: torch.Tensor, right: torch.Tensor, alpha: float) -> torch.Tensor:
    """alpha times a matrix product, rounded once."""
    if alpha == 1:
        return left @ right
    return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=alpha)


@contextmanager
def _bf16_operands() -> Iterator[None]:
    """Products of float32 tensors on a CPU round these to bfloat16, and sum in float32."""
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
