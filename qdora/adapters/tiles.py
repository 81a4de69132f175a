"""Row tiles of the adapted weight s ∘ (W + c B A), as the product sees them."""

from __future__ import annotations

from collections.abc import Iterator

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
