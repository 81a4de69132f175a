"""Quantization to NF4 of a whole weight or of one rank's share of it, to the same bits.

Blocks run over the flattened matrix, so a block may straddle the rows of two ranks: each quantizes it,
from the same values.  The second quantization needs the mean of all scales, which ranks exchange.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import bitsandbytes.functional as bnb
import torch

from qdora.quant.share import WHOLE, Share
from qdora.quant.weight import TILE_BYTES

ABSMAX_BLOCK = 256
"""NF4 scales that share one scale of the second quantization."""


class NF4Parts(NamedTuple):
    """One rank's codes and block scales, and the statistics of the second quantization, which all hold.

    Attributes:
        packed: (own rows, in / 2) uint8.
        absmax: (own blocks,) uint8 where doubly quantized, else float32.
        nested_absmax, nested_code, offset: of all blocks; None where there is no second quantization.
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    nested_absmax: torch.Tensor | None = None
    nested_code: torch.Tensor | None = None
    offset: torch.Tensor | None = None


def check_even(in_features: int) -> None:
    """Two codes share a byte, and no byte may belong to two rows.

    Raises: ValueError: `in_features` is odd.
    """
    if in_features % 2:
        raise ValueError(f"NF4 packs two weights a byte; in_features must be even, got {in_features}")


def block_count(shape: tuple[int, int], block_size: int) -> int:
    """Blocks of a weight, the last one possibly shorter."""
    return -(-shape[0] * shape[1] // block_size)


def rows_to_read(shape: tuple[int, int], block_size: int, share: Share) -> slice:
    """The rows that hold every value of the blocks that a rank's codes and scales come from.

    Its own rows, and where blocks or their shares do not end with a row, a few of its neighbours'.
    """
    values = _values_to_read(shape, block_size, share)
    in_features = shape[1]
    return slice(values.start // in_features, -(-values.stop // in_features))


def quantize_share(
    w_RI: torch.Tensor,
    shape: tuple[int, int],
    *,
    block_size: int,
    double_quantization: bool,
    share: Share = WHOLE,
    gather_scales: Callable[[torch.Tensor], torch.Tensor] = lambda scales: scales,
) -> NF4Parts:
    """Quantize a rank's share of a weight, on the device of its rows.

    Args:
        w_RI: the rows that `rows_to_read` names, floating point.
        shape: (out, in) of the whole weight, `in` even.
        gather_scales: joins all ranks' own float32 scales, in order of rank; every rank calls it once
            where the quantization is double.
    Returns: bit for bit this share of what one process makes of the whole weight.
    Raises: ValueError: `in` is odd.
    """
    check_even(shape[1])
    in_features = shape[1]
    values = _values_to_read(shape, block_size, share)
    first_row = rows_to_read(shape, block_size, share).start
    flat = w_RI.reshape(-1)[values.start - first_row * in_features : values.stop - first_row * in_features]
    codes, scales = _quantize_blocks(flat, block_size)
    rows, blocks = share.rows(shape[0]), share.rows(block_count(shape, block_size))
    first_byte = (rows.start * in_features - values.start) // 2
    packed = codes[first_byte : first_byte + (rows.stop - rows.start) * in_features // 2]
    packed = packed.view(rows.stop - rows.start, in_features // 2)
    first_block = blocks.start - values.start // block_size
    own_scales = scales[first_block : first_block + blocks.stop - blocks.start]
    if share.count > 1:  # not views: the codes of straddled blocks would stay in memory with them
        packed, own_scales = packed.clone(), own_scales.clone()
    if not double_quantization:
        return NF4Parts(packed, own_scales)
    absmax, nested_absmax, nested_code, offset = _quantize_scales(gather_scales(own_scales))
    return NF4Parts(packed, absmax[blocks].clone(), nested_absmax, nested_code, offset)


def _values_to_read(shape: tuple[int, int], block_size: int, share: Share) -> slice:
    """Flattened values of the blocks that hold a rank's own rows or whose scales it owns; whole blocks."""
    total = shape[0] * shape[1]
    rows, blocks = share.rows(shape[0]), share.rows(block_count(shape, block_size))
    spans = [
        (rows.start * shape[1], rows.stop * shape[1]),
        (blocks.start * block_size, blocks.stop * block_size),
    ]
    owned = [span for span in spans if span[0] < span[1]]
    if not owned:
        return slice(0, 0)
    start, stop = min(span[0] for span in owned), max(span[1] for span in owned)
    return slice(start // block_size * block_size, min(total, -(-stop // block_size) * block_size))


def _quantize_blocks(values: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(n / 2,) packed codes and (blocks,) float32 scales of n flattened values."""
    count, device = values.numel(), values.device
    packed = torch.empty(count // 2, dtype=torch.uint8, device=device)
    scales = torch.empty(-(-count // block_size), dtype=torch.float32, device=device)
    # By tiles, since the CPU kernel holds several float32 copies of what it is given.
    budget = TILE_BYTES.get(device.type, TILE_BYTES["cuda"]) // torch.float32.itemsize
    step = max(block_size, budget // block_size * block_size)
    for start in range(0, count, step):
        tile = values[start : start + step].contiguous()
        codes, tile_scales = torch.ops.bitsandbytes.quantize_4bit(tile, block_size, "nf4", torch.uint8)
        packed[start // 2 : start // 2 + codes.numel()] = codes.view(-1)
        first = start // block_size
        scales[first : first + tile_scales.numel()] = tile_scales.view(-1)
    return packed, scales


def _quantize_scales(
    scales: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales, code book and offset of the second quantization (arXiv:2305.14314 §3)."""
    offset = _mean(scales)
    absmax, nested = bnb.quantize_blockwise(scales - offset, blocksize=ABSMAX_BLOCK)
    return absmax, nested.absmax, nested.code, offset


def _mean(scales: torch.Tensor) -> torch.Tensor:
    """In one thread on a CPU: how many share a sum decides its last bit, and ranks have fewer each."""
    if scales.device.type != "cpu":
        return scales.mean()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return scales.mean()
    finally:
        torch.set_num_threads(threads)
