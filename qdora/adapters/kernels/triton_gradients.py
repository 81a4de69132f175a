"""The kernels of vectors, rank-sized matrices and gradients, in Triton; imported only where Triton is.

    N tokens   O out_features   R rank   S splits of the tokens

All arithmetic is in float32 and, but for the tensor cores' products, unfused.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TINY = tl.constexpr(torch.finfo(torch.float32).tiny)

SCALE_ROWS, SCALE_RANKS = 64, 32
"""row_scale: rows of a program, and ranks at a time."""
SUM_TOKENS, SUM_STEP, SUM_COLUMNS, SUM_WARPS = 64, 16, 128, 4
"""output_sums: a program loads 64 tokens at a time, all of them in flight."""
MIN_PROGRAMS, MAX_SPLITS = 256, 32
"""output_sums: as many tokens a program as leave two programs for each of the 132 SMs of an H100, and no more
than 32 parts to add up: these are written and read once more, each of 1 + R float32 rows."""
MAX_RANK, MAX_RANK_WIDE = 64, 16
"""Ranks of a program, of 16-bit and of float32 gradients, which need no tensor core but registers."""


@triton.jit
def _add(left, right):
    return left + right


@triton.jit
def row_scale_kernel(
    m, s, out, norm, initial, offset, b, O, b_stride_o, b_stride_r, factor,
    R: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    row_O = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    inside_O = row_O < O
    m_O = tl.load(initial + row_O, mask=inside_O, other=0) + tl.load(offset + row_O, mask=inside_O, other=0)
    s_O = tl.div_rn(m_O, tl.load(norm + row_O, mask=inside_O, other=1))
    tl.store(m + row_O, m_O, mask=inside_O)
    tl.store(s + row_O, s_O, mask=inside_O)
    if b is not None:
        for rank0 in range(0, R, BLOCK_R):
            rank_R = rank0 + tl.arange(0, BLOCK_R)
            inside_OR = inside_O[:, None] & (rank_R < R)[None, :]
            b_at = row_O[:, None] * b_stride_o + rank_R[None, :] * b_stride_r
            b_OR = tl.load(b + b_at, mask=inside_OR, other=0).to(tl.float32) * (s_O * factor)[:, None]
            at_OR = row_O[:, None] * R + rank_R[None, :]
            tl.store(out + at_OR, b_OR.to(out.dtype.element_ty), mask=inside_OR)


@triton.jit(do_not_specialize=["N"])
def output_sums_kernel(  # of some tokens: row 0 of each part is Σ g ∘ y, the rows from 1 on hᵀ g
    part, g, y, h, N, O, h_stride_n, h_stride_r, R: tl.constexpr, BLOCK_R: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK_N: tl.constexpr, STEP: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    col_O = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    split = tl.program_id(1)
    rank_R = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    sum_NO = tl.full([STEP, BLOCK_O], 0, tl.float32)
    sum_RO = tl.full([BLOCK_R, BLOCK_O], 0, tl.float32)
    for block in range(0, TOKENS, BLOCK_N):
        token0 = split * TOKENS + block
        start = token0.to(tl.int64) * O
        for step in tl.static_range(BLOCK_N // STEP):
            token_N = step * STEP + tl.arange(0, STEP)
            at_NO = token_N[:, None] * O + col_O[None, :]
            token_inside = token0 + token_N < N
            inside = token_inside[:, None] & (col_O < O)[None, :]
            g_NO = tl.load(g + start + at_NO, mask=inside, other=0)
            if y is not None:
                y_NO = tl.load(y + start + at_NO, mask=inside, other=0).to(tl.float32)
                sum_NO = tl.fma(g_NO.to(tl.float32), y_NO, sum_NO)
            if h is not None:
                h_at = rank_R[:, None] * h_stride_r + (token0 + token_N)[None, :] * h_stride_n
                h_RN = tl.load(h + h_at, mask=(rank_R < R)[:, None] & token_inside[None, :], other=0)
                sum_RO = tl.dot(h_RN, g_NO, sum_RO, input_precision="ieee")
    at_O = split.to(tl.int64) * (R + 1) * O + col_O
    if y is not None:
        first = tl.program_id(2) == 0
        tl.store(part + at_O, tl.reduce(sum_NO, 0, _add), mask=(col_O < O) & first)
    if h is not None:
        at_RO = at_O[None, :] + (1 + rank_R)[:, None] * O
        tl.store(part + at_RO, sum_RO, mask=(rank_R < R)[:, None] & (col_O < O)[None, :])


@triton.jit(do_not_specialize=["splits"])
def output_gradients_kernel(  # of row FIRST of the parts and the rows after it
    grad_m, grad_b, part, m, s, splits, O, scale, FIRST: tl.constexpr, R: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    col_O = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    row, inside_O = FIRST + tl.program_id(1), col_O < O
    split_S = tl.arange(0, SPLITS)
    at_SO = (split_S[:, None] * (R + 1) + row) * O + col_O[None, :]
    part_SO = tl.load(part + at_SO, mask=(split_S < splits)[:, None] & inside_O[None, :], other=0)
    sum_O = tl.reduce(part_SO, 0, _add)
    if row == 0:
        if grad_m is not None:
            # A magnitude of exactly 0 has y = 0: the least number makes its gradient 0 instead of 0/0.
            m_O = tl.load(m + col_O, mask=inside_O, other=1) + TINY
            tl.store(grad_m + col_O, tl.div_rn(sum_O, m_O), mask=inside_O)
    elif grad_b is not None:
        sum_O *= scale
        if s is not None:
            sum_O *= tl.load(s + col_O, mask=inside_O, other=0)
        tl.store(grad_b + col_O * R + (row - 1), sum_O, mask=inside_O)


def row_scale(
    norm_O: torch.Tensor,
    initial_O: torch.Tensor,
    offset_O: torch.Tensor,
    b_OR: torch.Tensor | None,
    factor: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As in `reference`."""
    rows, rank = norm_O.shape[0], 0 if b_OR is None else b_OR.shape[1]
    m_O, s_O = (torch.empty(rows, dtype=torch.float32, device=norm_O.device) for _ in range(2))
    b_scaled_OR = torch.empty((rows, rank) if rank else 0, dtype=dtype, device=norm_O.device)
    row_scale_kernel[triton.cdiv(rows, SCALE_ROWS),](
        m_O,
        s_O,
        b_scaled_OR,
        norm_O,
        initial_O,
        offset_O,
        b_OR,
        rows,
        *((0, 0) if b_OR is None else b_OR.stride()),
        factor,
        R=rank,
        BLOCK_O=SCALE_ROWS,
        BLOCK_R=min(SCALE_RANKS, max(1, triton.next_power_of_2(rank))),
        enable_fp_fusion=False,
    )
    return m_O, s_O, b_scaled_OR


def output_gradients(
    g_NO: torch.Tensor,
    y_NO: torch.Tensor | None,
    m_O: torch.Tensor | None,
    h_NR: torch.Tensor | None,
    s_O: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As in `reference`."""
    (tokens, outputs), rank = g_NO.shape, 0 if h_NR is None else h_NR.shape[1]
    grad_O, grad_OR = (
        torch.empty(shape, dtype=torch.float32, device=g_NO.device)
        for shape in (0 if y_NO is None else outputs, (outputs, rank) if rank else 0)
    )
    if grad_O.numel() + grad_OR.numel() == 0:
        return grad_O, grad_OR
    columns, block = triton.cdiv(outputs, SUM_COLUMNS), SUM_TOKENS
    while columns * (tokens // (2 * block)) >= MIN_PROGRAMS or triton.cdiv(tokens, block) > MAX_SPLITS:
        block *= 2
    splits = max(1, triton.cdiv(tokens, block))
    part = torch.empty(splits, 1 + rank, outputs, dtype=torch.float32, device=g_NO.device)
    wide = g_NO.dtype == torch.float32
    block_r = min(MAX_RANK_WIDE if wide else MAX_RANK, max(16, triton.next_power_of_2(rank)))
    output_sums_kernel[columns, splits, max(1, triton.cdiv(rank, block_r))](
        part,
        g_NO.contiguous(),
        None if y_NO is None else y_NO.contiguous(),
        h_NR,
        tokens,
        outputs,
        *((0, 0) if h_NR is None else h_NR.stride()),
        R=rank,
        BLOCK_R=block_r,
        TOKENS=block,
        BLOCK_N=SUM_TOKENS,
        STEP=SUM_STEP,
        BLOCK_O=SUM_COLUMNS,
        num_warps=SUM_WARPS,
        enable_fp_fusion=False,
    )
    first = int(y_NO is None)
    output_gradients_kernel[columns, 1 + rank - first](
        None if y_NO is None else grad_O,
        grad_OR if rank else None,
        part,
        m_O,
        s_O,
        splits,
        outputs,
        scale,
        FIRST=first,
        R=rank,
        SPLITS=triton.next_power_of_2(splits),
        BLOCK_O=SUM_COLUMNS,
        num_warps=SUM_WARPS,
        enable_fp_fusion=False,
    )
    return grad_O, grad_OR
