"""What every format of a frozen weight provides: row tiles, its shards, and its load from a checkpoint."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

import torch
from torch import nn

# On some CPUs bitsandbytes, imported after this, warns about a kernel for its own layers; they are not used.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

TILE_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
"""Memory of one tile: on a CPU what its caches hold, on a GPU what the memory can spare."""

GatherRows = Callable[[torch.Tensor, int], torch.Tensor]
"""From this rank's rows and the size of the first dimension of all ranks' rows to these; a collective."""


@dataclass(frozen=True)
class Shard:
    """Part `rank` of `world_size` along the first dimension, in the sizes of `torch.chunk`.

    All parts but the last ones have ceil(size / world_size) rows; where that does not divide, a later part
    is shorter or empty.  FSDP2 places its shards so.
    """

    rank: int = 0
    world_size: int = 1

    def rows(self, size: int) -> slice:
        """The rows of this shard, of a tensor with `size` rows."""
        step = -(-size // self.world_size)
        return slice(min(size, self.rank * step), min(size, (self.rank + 1) * step))


FULL = Shard()
"""The one shard of a tensor that is not sharded."""


def no_gather(rows: torch.Tensor, size: int) -> torch.Tensor:
    """The `GatherRows` of a process alone: its rows are all rows."""
    return rows


class StoredWeight(NamedTuple):
    """What a kernel reads of a frozen weight: its values, or its codes and what they stand for.

    A value is table[code] * scale, the scale absmax[block], or where that is quantized too
    nested_code[absmax[block]] * nested_absmax[block / nested_block_size] + offset.

    Attributes:
        values: (out, in) floating point, or (out, in / codes per byte) uint8, high nibble first.
        table: float32, the value of each code: (16,) for two codes a byte, (256,) for one; None for floating
            point, which has none of the rest either.
        absmax, nested_absmax, nested_code, offset, block_size, nested_block_size: as in `BlockwiseWeight`.
    """

    values: torch.Tensor
    table: torch.Tensor | None = None
    absmax: torch.Tensor | None = None
    nested_absmax: torch.Tensor | None = None
    nested_code: torch.Tensor | None = None
    offset: torch.Tensor | None = None
    block_size: int = 1
    nested_block_size: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.values.shape[0], self.values.shape[1] * codes_per_byte(self.table)


def codes_per_byte(table: torch.Tensor | None) -> int:
    """How many values an element of `StoredWeight.values` holds."""
    return 2 if table is not None and table.numel() == 16 else 1


class FrozenWeight(nn.Module, ABC):
    """A frozen (out, in) weight in some format, readable only by row tiles.

    Its parameters are sharded along their first dimension, its buffers are equal on all ranks.  It is built
    on the meta device, and materialized by `assign` with tensors from `from_rows` or from a checkpoint.

    Attributes:
        out_features, in_features: shape of the weight.
        quantization: name of the format, as in `model.quantization`.
    """

    quantization: ClassVar[str]
    out_features: int
    in_features: int

    @classmethod
    @abstractmethod
    def on_meta(
        cls, shape: tuple[int, int], *, dtype: torch.dtype, block_size: int, double_quantization: bool
    ) -> Self:
        """The weight without its bytes.

        Args:
            shape: (out, in).
            dtype: of an unquantized weight.
            block_size: values that share a quantization scale.
            double_quantization: quantize the scales too.
        Raises: ValueError: the format cannot hold the shape.
        """

    @classmethod
    def from_dense(
        cls, w_OI: torch.Tensor, *, block_size: int = 64, double_quantization: bool = True
    ) -> Self:
        """Quantize a floating-point weight, on its own device.

        Raises: ValueError: the format cannot hold the shape.
        """
        weight = cls.on_meta(
            (w_OI.shape[0], w_OI.shape[1]),
            dtype=w_OI.dtype,
            block_size=block_size,
            double_quantization=double_quantization,
        )
        weight.assign(weight.from_rows(w_OI, FULL, no_gather))
        return weight

    @property
    def device(self) -> torch.device:
        """Where the stored bytes are."""
        # Asked for in every pass: `parameters()` walks over submodules, of which there are none.
        return next(p.device for p in self._parameters.values() if p is not None)

    @property
    def norm_dtype(self) -> torch.dtype:
        """Dtype in which row norms of this weight are kept: at least float32."""
        return torch.float32

    @abstractmethod
    def tiles(
        self, dtype: torch.dtype, s_O: torch.Tensor | None = None
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield (rows, w_tile) from the first row to the last, w_tile (rows, in) in `dtype`.

        A tile is only valid until the next one is asked for, and must not be written to.

        Args:
            s_O: (out,) at least float32; each row is multiplied by its entry.
        """

    def stored(self) -> StoredWeight | None:
        """What a kernel reads, without gradients; None where no kernel reads the format."""
        return None

    def scaled_product(
        self, s_O: torch.Tensor | None = None
    ) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """What makes (N, out) s ∘ W x of float32 (N, in), reading the codes themselves; without gradients.

        For generation: a token of each sequence is little work for a W that is dequantized for it.

        Args:
            s_O: (out,) at least float32, kept beside the codes as it is now.
        Returns: None where no kernel of the device reads the format so.
        """
        return None

    @abstractmethod
    def rows_to_read(self, shard: Shard) -> slice:
        """The rows of the unquantized weight that `from_rows` needs for a shard."""

    @abstractmethod
    def from_rows(self, w_RI: torch.Tensor, shard: Shard, gather: GatherRows) -> dict[str, torch.Tensor]:
        """A shard's parameters, and the buffers, from rows of the unquantized weight.

        Args:
            w_RI: the rows that `rows_to_read` names, floating point, on the device that computes.
            gather: called by every rank equally often.
        Returns: tensors by the names of this module's parameters and buffers; bit for bit this shard of what
            a process alone makes of the full weight.
        """

    def assign(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Materialize: replace parameters (local shards or full tensors) and buffers by name."""
        for name, tensor in tensors.items():
            if name in self._parameters:
                setattr(self, name, parameter_like(self.get_parameter(name), tensor))
            else:
                setattr(self, name, tensor)

    def dense(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The (out, in) weight as one tensor, in `norm_dtype` unless told otherwise."""
        dtype = dtype or self.norm_dtype
        w_OI = torch.empty(self.out_features, self.in_features, dtype=dtype, device=self.device)
        for rows, w_tile in self.tiles(dtype):
            w_OI[rows] = w_tile
        return w_OI

    def requantize(self, w_OI: torch.Tensor) -> None:
        """Replace the weight by another one of its shape, in the same format and on the same device."""
        self.assign(self.from_rows(w_OI, FULL, no_gather))

    @property
    def trained(self) -> nn.Parameter | None:
        """The parameter that is the weight itself, where that is trained."""
        return None

    def is_statistic(self, name: str) -> bool:
        """Whether a parameter or buffer describes the quantization rather than holding the weight."""
        return False

    @property
    def logical_parameters(self) -> int:
        """Parameters of the architecture: out * in, however many values share a byte."""
        return self.out_features * self.in_features


def parameter_like(old: nn.Parameter, tensor: torch.Tensor) -> nn.Parameter:
    """A parameter with other values, trained where the old one was, its gradient in the same dtype."""
    new = nn.Parameter(tensor, requires_grad=old.requires_grad)
    if old.requires_grad and old.grad_dtype is not None:
        new.grad_dtype = old.grad_dtype
    return new


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
