"""Frozen weights whose flattened values are quantized in blocks, each with a scale of its own.

Blocks run over the flattened matrix, so a block may straddle the rows of two ranks: each quantizes it, from
the same values.  The second quantization needs the mean of all scales, which the ranks gather.

The module owns its codes and statistics.  bitsandbytes' own parameter class repacks the bytes on some CPUs
and loses the statistics when the parameter is sharded.
"""

from __future__ import annotations

import importlib
import os
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from types import ModuleType
from typing import ClassVar, Self, TypeVar

import torch
from torch import nn

from qdora.quant.base import (
    TILE_BYTES,
    FrozenWeight,
    GatherRows,
    Shard,
    StoredWeight,
    align_rows,
    rows_per_tile,
)

T = TypeVar("T")

SCALES_PER_BLOCK = 256
"""Scales that share one scale of the second quantization, unless a checkpoint says otherwise."""
CODE_BOOK = 256
"""Entries of the code book of the second quantization."""

_CACHED = 1 << 17
"""Values that a CPU quantizes at a time."""
_COMPILE = "TORCHDYNAMO_DISABLE"
_on_device: dict[tuple[str, torch.device], torch.Tensor] = {}


def without_modes(make: Callable[[], T]) -> T:
    """Make tensors that stay where no mode of the caller is in force.

    Modes are a thread's own: in this one tensors are neither the fake ones of an estimate nor on the meta
    device of a model under construction.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(make).result()


@cache
def import_bitsandbytes() -> ModuleType:
    """`bitsandbytes.functional`, imported where the first weight is made, since that takes a second.

    It would take two: bitsandbytes hands functions that no weight of ours calls to `torch.compile`, which
    brings inductor; here they stay uncompiled.  And on some CPUs it would fetch a kernel for its own layers
    from the hub and run it, where the package `kernels` is installed; here it does not find that package.
    """
    before, kernels = os.environ.get(_COMPILE), sys.modules.get("kernels")
    os.environ[_COMPILE] = "1"
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        return importlib.import_module("bitsandbytes.functional")
    finally:
        if before is None:
            del os.environ[_COMPILE]
        else:
            os.environ[_COMPILE] = before
        if kernels is None:
            del sys.modules["kernels"]
        else:
            sys.modules["kernels"] = kernels


@cache
def _tables() -> dict[str, torch.Tensor]:
    """The values of bitsandbytes' codes, on the CPU."""
    bnb = import_bitsandbytes()
    return without_modes(
        lambda: {
            "nf4": bnb.get_4bit_type("nf4", device="cpu"),
            "fp4": bnb.get_4bit_type("fp4", device="cpu"),
            "int8": bnb.create_dynamic_map(),
        }
    )


class BlockwiseWeight(FrozenWeight):
    """A frozen (out, in) weight as uint8 codes and block scales.

    Attributes:
        packed: (out, in / codes_per_byte) uint8, the codes of the flattened matrix in row order.
        absmax: (out * in / block,) block scales; uint8 codes where doubly quantized, else float32.  A
            parameter, so that it is sharded with the codes.
        nested_absmax, nested_code, offset: statistics of the second quantization, or None.
        block_size: values that share one scale.
        nested_block_size: scales that share one.
    """

    codes_per_byte: ClassVar[int]
    packed: nn.Parameter
    absmax: nn.Parameter
    nested_absmax: torch.Tensor | None
    nested_code: torch.Tensor | None
    offset: torch.Tensor | None

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        block_size: int,
        double_quantization: bool,
        nested_block_size: int = SCALES_PER_BLOCK,
    ) -> None:
        super().__init__()
        _tables()  # the operators
        self.out_features, self.in_features = shape
        if self.in_features % self.codes_per_byte:
            raise ValueError(
                f"{self.quantization.upper()} packs two weights a byte; in_features must be even, "
                f"got {self.in_features}"
            )
        self.block_size, self.nested_block_size = block_size, nested_block_size
        width = self.in_features // self.codes_per_byte
        scale_dtype = torch.uint8 if double_quantization else torch.float32
        self.packed = nn.Parameter(_meta(self.out_features, width, dtype=torch.uint8), requires_grad=False)
        self.absmax = nn.Parameter(_meta(self.blocks, dtype=scale_dtype), requires_grad=False)
        nested_blocks = -(-self.blocks // nested_block_size)
        self.register_buffer("nested_absmax", _meta(nested_blocks) if double_quantization else None)
        self.register_buffer("nested_code", _meta(CODE_BOOK) if double_quantization else None)
        self.register_buffer("offset", _meta() if double_quantization else None)

    @classmethod
    def on_meta(
        cls, shape: tuple[int, int], *, dtype: torch.dtype, block_size: int, double_quantization: bool
    ) -> Self:
        """As `FrozenWeight.on_meta`; the dtype of the unquantized weight does not matter."""
        return cls(shape, block_size=block_size, double_quantization=double_quantization)

    @property
    def blocks(self) -> int:
        """Blocks of the weight, the last one possibly shorter."""
        return -(-self.out_features * self.in_features // self.block_size)

    def is_statistic(self, name: str) -> bool:
        """All but the codes."""
        return name != "packed"

    @abstractmethod
    def quantize_block_values(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Packed codes and float32 scales of flattened values that begin with a block."""

    @abstractmethod
    def dequantize_block_values(
        self, codes: torch.Tensor, scales: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype
    ) -> torch.Tensor:
        """Values of `shape` in a dtype of the kernels, from packed codes that begin with a block."""

    def code_values(self, device: torch.device) -> torch.Tensor:
        """(16,) or (256,) float32 on a device: the value, in -1 to 1, of each code."""
        return code_values(self.quantization, device)

    def scales(self) -> torch.Tensor:
        """(out * in / block,) float32 block scales."""
        if self.nested_absmax is None or self.offset is None:
            return self.absmax.detach()
        scales: torch.Tensor = torch.ops.bitsandbytes.dequantize_blockwise(
            self.absmax.detach(), self.nested_absmax, self.nested_code, self.nested_block_size, torch.float32
        )
        return scales.add_(self.offset)

    def stored(self) -> StoredWeight:
        """As `FrozenWeight.stored`, the codes."""
        packed = self.packed.detach()
        return StoredWeight(
            packed,
            self.code_values(packed.device),
            self.absmax.detach(),
            self.nested_absmax,
            self.nested_code,
            self.offset,
            self.block_size,
            self.nested_block_size,
        )

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
            if s_O is None:
                yield slice(start, stop), self._dequantize(packed_flat, scales, start, stop, dtype)
            else:  # rounded once: s of a W that is on the grid of 16 bits may not move it
                w_tile = self._dequantize(packed_flat, scales, start, stop, s_O.dtype)
                yield slice(start, stop), w_tile.mul_(s_O[start:stop, None]).to(dtype)

    def _dequantize(
        self, packed_flat: torch.Tensor, scales: torch.Tensor, start: int, stop: int, dtype: torch.dtype
    ) -> torch.Tensor:
        first, last = start * self.in_features, stop * self.in_features
        # The kernels know three dtypes; float64 serves the exactness tests only.
        w_tile = self.dequantize_block_values(
            packed_flat[first // self.codes_per_byte : last // self.codes_per_byte],
            scales[first // self.block_size : -(-last // self.block_size)],
            self._kernel_shape(last - first),
            torch.float32 if dtype == torch.float64 else dtype,
        )
        return w_tile.view(stop - start, self.in_features).to(dtype)

    def _kernel_shape(self, values: int) -> tuple[int, int]:
        """A shape whose rows are whole blocks: the kernel for AVX512 takes wrong scales for any other."""
        if self.in_features % self.block_size == 0:
            return values // self.in_features, self.in_features
        if values % self.block_size == 0:
            return values // self.block_size, self.block_size
        return 1, values

    def rows_to_read(self, shard: Shard) -> slice:
        """The shard's own rows, and where blocks or their shards do not end with a row, a few neighbours."""
        values = self._values_to_read(shard)
        return slice(values.start // self.in_features, -(-values.stop // self.in_features))

    def from_rows(self, w_RI: torch.Tensor, shard: Shard, gather: GatherRows) -> dict[str, torch.Tensor]:
        """As `FrozenWeight.from_rows`; gathers once where the quantization is double."""
        values = self._values_to_read(shard)
        first_row = self.rows_to_read(shard).start
        start, stop = (edge - first_row * self.in_features for edge in (values.start, values.stop))
        codes, scales = self._quantize_blocks(w_RI.reshape(-1)[start:stop])
        rows, blocks = shard.rows(self.out_features), shard.rows(self.blocks)
        count = rows.stop - rows.start
        width = self.in_features // self.codes_per_byte
        first_byte = (rows.start * self.in_features - values.start) // self.codes_per_byte
        packed = codes[first_byte : first_byte + count * width].view(count, width)
        first_block = blocks.start - values.start // self.block_size
        local_scales = scales[first_block : first_block + blocks.stop - blocks.start]
        if shard.world_size > 1:  # not views: the codes of straddled blocks would stay in memory with them
            packed, local_scales = packed.clone(), local_scales.clone()
        if self.nested_absmax is None:
            return {"packed": packed, "absmax": local_scales}
        absmax, nested = _quantize_scales(gather(local_scales, self.blocks), self.nested_block_size)
        return {"packed": packed, "absmax": absmax[blocks].clone(), **nested}

    def _values_to_read(self, shard: Shard) -> slice:
        """Flattened values of the blocks that hold a shard's rows or whose scales it has; whole blocks."""
        total, block_size = self.out_features * self.in_features, self.block_size
        rows, blocks = shard.rows(self.out_features), shard.rows(self.blocks)
        spans = [
            (rows.start * self.in_features, rows.stop * self.in_features),
            (blocks.start * block_size, blocks.stop * block_size),
        ]
        owned = [span for span in spans if span[0] < span[1]]
        if not owned:
            return slice(0, 0)
        start, stop = min(span[0] for span in owned), max(span[1] for span in owned)
        return slice(start // block_size * block_size, min(total, -(-stop // block_size) * block_size))

    def _quantize_blocks(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Packed codes and (blocks,) float32 scales of flattened values."""
        count, device, block_size = values.numel(), values.device, self.block_size
        packed = torch.empty(count // self.codes_per_byte, dtype=torch.uint8, device=device)
        scales = torch.empty(-(-count // block_size), dtype=torch.float32, device=device)
        # By tiles, since there are several float32 copies of what is quantized; a core's cache holds them.
        budget = TILE_BYTES["cuda"] // torch.float32.itemsize if device.type != "cpu" else _CACHED
        step = max(block_size, budget // block_size * block_size)
        for start in range(0, count, step):
            codes, tile_scales = self.quantize_block_values(values[start : start + step].contiguous())
            first_byte, first_block = start // self.codes_per_byte, start // block_size
            packed[first_byte : first_byte + codes.numel()] = codes.view(-1)
            scales[first_block : first_block + tile_scales.numel()] = tile_scales.view(-1)
        return packed, scales

    def extra_repr(self) -> str:
        """Shape, format and block size, for printing."""
        double = "double" if self.nested_absmax is not None else "single"
        return (
            f"{self.out_features}x{self.in_features}, {self.quantization}, block {self.block_size}, "
            f"{double} quantization"
        )


def code_values(
    quantization: str, device: torch.device, make: Callable[[], torch.Tensor] | None = None
) -> torch.Tensor:
    """(16,) or (256,) float32: the value, in -1 to 1, of each of a format's codes.

    Args:
        make: makes the table, on the CPU, of a format that bitsandbytes lacks.
    """
    found = _on_device.get((quantization, device))
    if found is None:
        found = (make() if make is not None else _tables()[quantization]).to(device)
        if type(found) is torch.Tensor:  # not the fake tensor of an estimate
            _on_device[quantization, device] = found
    return found


def code_book(device: torch.device) -> torch.Tensor:
    """(256,) float32: the values of bitsandbytes' dynamic 8-bit codes, in -1 to 1 (arXiv:2110.02861 §2)."""
    return code_values("int8", device)


def _meta(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def _quantize_scales(scales: torch.Tensor, block_size: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Codes, and the statistics, of the second quantization (arXiv:2305.14314 §3)."""
    bnb = import_bitsandbytes()
    offset = _mean(scales)
    absmax, nested = bnb.quantize_blockwise(
        scales - offset, code=code_book(scales.device), blocksize=block_size
    )
    return absmax, {"nested_absmax": nested.absmax, "nested_code": nested.code, "offset": offset}


def _mean(scales: torch.Tensor) -> torch.Tensor:
    """In one thread on a CPU: how many split a sum decides its last bit, and ranks have fewer each."""
    if scales.device.type != "cpu":
        return scales.mean()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return scales.mean()
    finally:
        torch.set_num_threads(threads)
