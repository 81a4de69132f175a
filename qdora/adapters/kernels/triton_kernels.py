"""The kernels that read W, in Triton, and their launches; imported only where Triton is.

    N tokens   O out_features   I in_features   R rank   C chunks of a row, each within one quantization block

All arithmetic is in float32 and unfused: a product and a sum contracted to one rounding would differ from
bitsandbytes' scales.  Offsets that can pass 2³¹ are scalars in 64 bits; what is added to them stays in 32.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from qdora.quant.base import StoredWeight, codes_per_byte

TINY = tl.constexpr(torch.finfo(torch.float32).tiny)

TILE_ROWS, TILE_COLUMNS, TILE_WARPS = 64, 128, 8
"""adapted_tile: 32 values a thread, so that two 8-warp programs and more fit the registers of an SM."""
NORM_ROWS, NORM_COLUMNS, NORM_WARPS = 16, 256, 8
"""row_norm: a program has full rows; with 16 each, 4096 rows are 256 programs for the 132 SMs of an H100."""
MAX_RANK, MAX_RANK_WIDE = 64, 16
"""Ranks that one product takes, of 16-bit and of float32 factors, which need no tensor core but registers."""


@triton.jit
def _weight_tile(  # rows row0 and on of W, the columns of byte0 and on; zero outside
    values, table, absmax, nested_absmax, nested_code, offset, row0, last, byte0, width,
    PER_BYTE: tl.constexpr, CHUNK: tl.constexpr, BLOCK_SIZE: tl.constexpr, NESTED_SIZE: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    row_O = tl.arange(0, BLOCK_O)
    start = row0.to(tl.int64) * width
    if table is None:
        col_I = byte0 + tl.arange(0, BLOCK_I)
        inside_OI = (row0 + row_O < last)[:, None] & (col_I < width)[None, :]
        at_OI = row_O[:, None] * width + col_I[None, :]
        w_OI = tl.load(values + start + at_OI, mask=inside_OI, other=0).to(tl.float32)
    else:
        chunks = tl.arange(0, BLOCK_I // (CHUNK * PER_BYTE))
        byte_C = (byte0 + chunks * CHUNK)[None, :, None]
        at_OC = (row_O * width)[:, None, None] + byte_C
        rows_inside = (row0 + row_O < last)[:, None, None]
        # A scale for each chunk: a block may straddle rows, but no chunk straddles blocks.
        flat = start * PER_BYTE
        inside_OC = rows_inside & (byte_C < width)
        block_OC = (flat % BLOCK_SIZE).to(tl.int32) + at_OC * PER_BYTE
        block_OC = block_OC // BLOCK_SIZE + (flat // BLOCK_SIZE).to(tl.int32)
        scale_OC = tl.load(absmax + block_OC, mask=inside_OC, other=0)
        if nested_absmax is not None:
            nested_OC = tl.load(nested_absmax + block_OC // NESTED_SIZE, mask=inside_OC, other=0)
            scale_OC = tl.load(nested_code + scale_OC.to(tl.int32)) * nested_OC + tl.load(offset)
            scale_OC = tl.where(inside_OC, scale_OC, 0.0)
        within = tl.arange(0, CHUNK)[None, None, :]
        inside = rows_inside & (byte_C + within < width)
        codes = tl.load(values + start + (at_OC + within), mask=inside, other=0).to(tl.int32)
        if PER_BYTE == 2:
            high = tl.load(table + (codes >> 4)) * scale_OC
            low = tl.load(table + (codes & 15)) * scale_OC
            w_OI = tl.reshape(tl.join(high, low), [BLOCK_O, BLOCK_I])
        else:
            w_OI = tl.reshape(tl.load(table + codes) * scale_OC, [BLOCK_O, BLOCK_I])
    return w_OI


@triton.jit
def _update_tile(  # B A of the same rows and columns
    a, b, row0, last, col0, I, a_stride_r, a_stride_i, b_stride_o, b_stride_r, R: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    row_O = row0 + tl.arange(0, BLOCK_O)
    col_I = col0 + tl.arange(0, BLOCK_I)
    total_OI = tl.full([BLOCK_O, BLOCK_I], 0, tl.float32)
    for rank0 in range(0, R, BLOCK_R):
        rank_R = rank0 + tl.arange(0, BLOCK_R)
        b_at = row_O[:, None] * b_stride_o + rank_R[None, :] * b_stride_r
        a_at = rank_R[:, None] * a_stride_r + col_I[None, :] * a_stride_i
        b_OR = tl.load(b + b_at, mask=(row_O < last)[:, None] & (rank_R < R)[None, :], other=0)
        a_RI = tl.load(a + a_at, mask=(rank_R < R)[:, None] & (col_I < I)[None, :], other=0)
        if a_RI.dtype != b_OR.dtype:
            a_RI, b_OR = a_RI.to(tl.float32), b_OR.to(tl.float32)
        total_OI = tl.dot(b_OR, a_RI, total_OI, input_precision="ieee")
    return total_OI


@triton.jit(do_not_specialize=["first", "last"])
def adapted_tile_kernel(
    out, values, table, absmax, nested_absmax, nested_code, offset, s, a, b, first, last, width, a_stride_r,
    a_stride_i, b_stride_o, b_stride_r, scale, factor, PER_BYTE: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, NESTED_SIZE: tl.constexpr, R: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    row0 = first + tl.program_id(1) * BLOCK_O
    byte0 = tl.program_id(0) * (BLOCK_I // PER_BYTE)
    col0, I = byte0 * PER_BYTE, width * PER_BYTE
    tile = _weight_tile(
        values, table, absmax, nested_absmax, nested_code, offset, row0, last, byte0, width,
        PER_BYTE, CHUNK, BLOCK_SIZE, NESTED_SIZE, BLOCK_O, BLOCK_I,
    )  # fmt: skip
    if a is not None:
        update = _update_tile(
            a, b, row0, last, col0, I, a_stride_r, a_stride_i, b_stride_o, b_stride_r,
            R, BLOCK_R, BLOCK_O, BLOCK_I,
        )  # fmt: skip
        tile = tl.fma(update, scale, tile)
    row_O = tl.arange(0, BLOCK_O)
    col_I = col0 + tl.arange(0, BLOCK_I)
    inside_O = row0 + row_O < last
    if s is not None:
        tile *= (tl.load(s + row0 + row_O, mask=inside_O, other=0) * factor)[:, None]
    elif factor is not None:
        tile *= factor
    at_OI = row_O[:, None] * I + col_I[None, :]
    start = (row0 - first).to(tl.int64) * I
    tl.store(
        out + start + at_OI, tile.to(out.dtype.element_ty), mask=inside_O[:, None] & (col_I < I)[None, :]
    )


@triton.jit
def _add(left, right):
    return left + right


@triton.jit
def row_norm_kernel(
    norm, values, table, absmax, nested_absmax, nested_code, offset, a, b, O, width, a_stride_r, a_stride_i,
    b_stride_o, b_stride_r, scale, WIDTH: tl.constexpr, PER_BYTE: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, NESTED_SIZE: tl.constexpr, R: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    row0 = tl.program_id(0) * BLOCK_O
    sum_OI = tl.full([BLOCK_O, BLOCK_I], 0, tl.float32)
    for byte0 in range(0, WIDTH, BLOCK_I // PER_BYTE):
        w_OI = _weight_tile(
            values, table, absmax, nested_absmax, nested_code, offset, row0, O, byte0, width,
            PER_BYTE, CHUNK, BLOCK_SIZE, NESTED_SIZE, BLOCK_O, BLOCK_I,
        )  # fmt: skip
        if a is not None:
            update = _update_tile(
                a, b, row0, O, byte0 * PER_BYTE, width * PER_BYTE,
                a_stride_r, a_stride_i, b_stride_o, b_stride_r, R, BLOCK_R, BLOCK_O, BLOCK_I,
            )  # fmt: skip
            w_OI = tl.fma(update, scale, w_OI)
        sum_OI = tl.fma(w_OI, w_OI, sum_OI)
    # Sums of two: their order does not follow from where the compiler keeps a value, which differs with
    # and without an update.  So B = 0 has the norm of W itself, to the last bit.
    for level in tl.static_range(LEVELS):
        sum_OI = tl.reduce(tl.reshape(sum_OI, [BLOCK_O, 2, BLOCK_I >> (level + 1)]), 1, _add)
    norm2_O = tl.reshape(sum_OI, [BLOCK_O])
    row_O = row0 + tl.arange(0, BLOCK_O)
    tl.store(norm + row_O, tl.sqrt_rn(tl.where(norm2_O < TINY, TINY, norm2_O)), mask=row_O < O)


def _stored_constants(weight: StoredWeight) -> dict[str, Any]:
    per_byte = codes_per_byte(weight.table)
    together = math.gcd(8, weight.shape[1], weight.block_size)
    return {
        "PER_BYTE": per_byte,
        "CHUNK": max(1, together // per_byte),
        "BLOCK_SIZE": weight.block_size,
        "NESTED_SIZE": weight.nested_block_size,
        "num_stages": 1,
        "enable_fp_fusion": False,
    }


def _update_arguments(
    a_RI: torch.Tensor | None, b_OR: torch.Tensor | None
) -> tuple[tuple[int, ...], dict[str, int]]:
    if a_RI is None or b_OR is None:
        return (0, 0, 0, 0), {"R": 0, "BLOCK_R": 16}
    rank, wide = a_RI.shape[0], torch.float32 in (a_RI.dtype, b_OR.dtype) or a_RI.dtype != b_OR.dtype
    block = min(MAX_RANK_WIDE if wide else MAX_RANK, max(16, triton.next_power_of_2(rank)))
    return (*a_RI.stride(), *b_OR.stride()), {"R": rank, "BLOCK_R": block}


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
    """As in `reference`."""
    inputs = weight.shape[1]
    out = torch.empty(last - first, inputs, dtype=dtype, device=weight.values.device)
    if out.numel() == 0:
        return out
    strides, ranks = _update_arguments(a_RI, b_OR)
    grid = (triton.cdiv(inputs, TILE_COLUMNS), triton.cdiv(last - first, TILE_ROWS))
    adapted_tile_kernel[grid](
        out,
        *weight[:6],
        s_O,
        a_RI,
        b_OR,
        first,
        last,
        weight.values.shape[1],
        *strides,
        scale,
        factor if s_O is not None or factor != 1 else None,
        BLOCK_O=TILE_ROWS,
        BLOCK_I=TILE_COLUMNS,
        num_warps=TILE_WARPS,
        **ranks,
        **_stored_constants(weight),
    )
    return out


def row_norm(
    weight: StoredWeight, a_RI: torch.Tensor | None, b_OR: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """As in `reference`."""
    rows, width = weight.values.shape
    norm_O = torch.empty(rows, dtype=torch.float32, device=weight.values.device)
    strides, ranks = _update_arguments(a_RI, b_OR)
    row_norm_kernel[triton.cdiv(rows, NORM_ROWS),](
        norm_O,
        *weight[:6],
        a_RI,
        b_OR,
        rows,
        width,
        *strides,
        scale,
        WIDTH=width,
        BLOCK_O=NORM_ROWS,
        BLOCK_I=NORM_COLUMNS,
        LEVELS=NORM_COLUMNS.bit_length() - 1,
        num_warps=NORM_WARPS,
        **ranks,
        **_stored_constants(weight),
    )
    return norm_O
