"""What an adapted layer asks of its frozen weight: its shape and its rows, a tile at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import torch

TILE_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
"""Memory of one tile: on a CPU what its caches hold, on a GPU what the memory can spare."""


@runtime_checkable
class FrozenWeight(Protocol):
    """A frozen (out, in) weight, readable only by row tiles."""

    out_features: int
    in_features: int

    @property
    def device(self) -> torch.device:
        """Where the stored bytes are."""
        ...

    @property
    def norm_dtype(self) -> torch.dtype:
        """Dtype in which row norms of this weight are kept: at least float32."""
        ...

    def tiles(
        self, dtype: torch.dtype, s_O: torch.Tensor | None = None
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield (rows, w_tile) from the first row to the last, w_tile (rows, in) in `dtype`.

        A tile is only valid until the next one is asked for, and must not be written to.

        Args:
            s_O: (out,) at least float32; each row is multiplied by its entry.
        """
        ...


def rows_per_tile(out_features: int, in_features: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows of a tile that fits the device's tile memory, at least 1."""
    budget = TILE_BYTES.get(device.type, TILE_BYTES["cuda"])
    return max(1, min(out_features, budget // (in_features * dtype.itemsize)))


def align_rows(rows: int, in_features: int, block_size: int) -> int:
    """The nearest row count, not below one alignment, whose tiles begin on a block boundary.

    A block of `block_size` weights runs over the flattened matrix, so where a row is not
    a whole number of blocks only every lcm(in, block)/in-th row begins one.
    """
    step = block_size // math.gcd(in_features, block_size)
    return max(step, rows // step * step)
