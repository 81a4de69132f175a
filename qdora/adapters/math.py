"""The algebra of an adapted layer: pure functions on tensors, no state.

    y = s * (W x + c B A drop(x)) + bias,     s = m / ||W + c B A||_row

    B tokens of the batch, T positions, N = B*T   I in_features   O out_features   R rank

W is only ever seen as row tiles.  BA, an identity matrix, or a whole dequantized W never exist:
backward asks for the tiles again (docs/math.md derives every formula here).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from qdora.quant.weight import FrozenWeight


def row_norms_squared(weight: FrozenWeight) -> torch.Tensor:
    """||W||² of each row: (O,), in the weight's norm dtype (at least float32)."""
    norms_O = torch.empty(weight.out_features, dtype=weight.norm_dtype, device=weight.device)
    for rows, w_tile in weight.tiles(weight.norm_dtype):
        torch.linalg.vector_norm(w_tile, dim=1, out=norms_O[rows])
    return norms_O.square_()


def weight_times_a(weight: FrozenWeight, a_RI: torch.Tensor) -> torch.Tensor:
    """W Aᵀ: (O, R) in the weight's norm dtype, for when no forward product is at hand."""
    dtype = weight.norm_dtype
    wa_OR = torch.empty(weight.out_features, a_RI.shape[0], dtype=dtype, device=weight.device)
    for rows, w_tile in weight.tiles(dtype):
        torch.mm(w_tile, a_RI.to(dtype).T, out=wa_OR[rows])
    return wa_OR


def factored_norm(
    w2_O: torch.Tensor, wa_OR: torch.Tensor, a_RI: torch.Tensor, b_OR: torch.Tensor, scale: float
) -> torch.Tensor:
    """||W + c BA|| of each row, from rank-sized products alone.

    ||W||² + 2c rowsum((W Aᵀ) ∘ B) + c² rowsum((B (A Aᵀ)) ∘ B)      (docs/math.md §3)

    Args:
        w2_O: (O,) squared row norms of W; their dtype is the dtype of the result.
        wa_OR: (O, R) W Aᵀ.
        a_RI, b_OR: the factors.
        scale: c.
    Returns: (O,)
    """
    dtype = w2_O.dtype
    a_RI, b_OR, wa_OR = a_RI.to(dtype), b_OR.to(dtype), wa_OR.to(dtype)
    gram_RR = a_RI @ a_RI.T
    cross_O = torch.linalg.vecdot(wa_OR, b_OR)
    square_O = torch.linalg.vecdot(b_OR @ gram_RR, b_OR)
    # Rounding may take a row whose update cancels W a hair below zero.
    norm2_O: torch.Tensor = w2_O + 2 * scale * cross_O + scale * scale * square_O
    return norm2_O.clamp_min_(0).sqrt_()


def row_scale(m_O: torch.Tensor, norm_O: torch.Tensor) -> torch.Tensor:
    """s = m / norm; an all-zero row (padded vocabularies have them) stays zero instead of 0/0."""
    return m_O / norm_O.clamp_min(torch.finfo(norm_O.dtype).tiny)


def frozen_product(
    x_NI: torch.Tensor, weight: FrozenWeight, a_RI: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """W x, and W Aᵀ where A is given: one pass over the tiles serves both.

    Returns: (N, O) in the dtype of x_NI; (O, R) or None.
    """
    u_NO = x_NI.new_empty(x_NI.shape[0], weight.out_features)
    wa_OR = None if a_RI is None else x_NI.new_empty(weight.out_features, a_RI.shape[0])
    for rows, w_tile in weight.tiles(x_NI.dtype):
        torch.mm(x_NI, w_tile.T, out=u_NO[:, rows])
        if a_RI is not None and wa_OR is not None:
            torch.mm(w_tile, a_RI.T, out=wa_OR[rows])
    return u_NO, wa_OR


def frozen_product_transposed(g_NO: torch.Tensor, weight: FrozenWeight) -> torch.Tensor:
    """g W: (N, I) in the dtype of g_NO, the sum over tiles accumulated in at least float32."""
    total_NI: torch.Tensor | None = None
    for rows, w_tile in weight.tiles(g_NO.dtype):
        g_tile = g_NO[:, rows]
        if total_NI is None:
            if w_tile.shape[0] == weight.out_features:
                return g_tile @ w_tile
            total_NI = torch.zeros(
                g_NO.shape[0],
                weight.in_features,
                dtype=torch.promote_types(g_NO.dtype, torch.float32),
                device=g_NO.device,
            )
        if total_NI.dtype == g_NO.dtype:
            total_NI.addmm_(g_tile, w_tile)
        else:
            total_NI += g_tile @ w_tile
    assert total_NI is not None
    return total_NI.to(g_NO.dtype)


def keep_mask(x_NI: torch.Tensor, dropout: float, seed: int) -> torch.Tensor:
    """(N, I) of 0 and 1/(1-p), the same for the same seed: backward draws it again, nothing is kept."""
    generator = torch.Generator(device=x_NI.device).manual_seed(seed)
    kept = torch.empty_like(x_NI).bernoulli_(1 - dropout, generator=generator)
    return kept.div_(1 - dropout)


class _LowRankLinear(torch.autograd.Function):
    """u = W x + c B A drop(x); see `low_rank_linear`."""

    @staticmethod
    def forward(
        ctx: Any,
        x_NI: torch.Tensor,
        a_RI: torch.Tensor | None,
        b_OR: torch.Tensor | None,
        weight: FrozenWeight,
        scale: float,
        dropout: float,
        with_wa: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        dtype = x_NI.dtype
        a_cast = None if a_RI is None else a_RI.to(dtype)
        u_NO, wa_OR = frozen_product(x_NI, weight, a_cast if with_wa else None)
        h_NR = None
        ctx.dropout_seed = None
        if a_cast is not None and b_OR is not None:
            if dropout:
                # From the CPU generator: activation recomputation restores it, and no device waits.
                ctx.dropout_seed = int(torch.randint(2**62, ()).item())
                x_NI_kept = x_NI * keep_mask(x_NI, dropout, ctx.dropout_seed)
                h_NR = x_NI_kept @ a_cast.T
            else:
                h_NR = x_NI @ a_cast.T
            u_NO.addmm_(h_NR, b_OR.to(dtype).T, alpha=scale)
        # Without a direction backward needs the weight alone, and x need not be kept.
        ctx.save_for_backward(*((x_NI, a_RI, b_OR, h_NR) if a_RI is not None else ()))
        ctx.weight, ctx.scale, ctx.dropout = weight, scale, dropout
        if wa_OR is not None:
            ctx.mark_non_differentiable(wa_OR)
        return u_NO, wa_OR

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_NO: torch.Tensor, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        grad_x = grad_a = grad_b = None
        needs_x = ctx.needs_input_grad[0]
        if needs_x:
            grad_x = frozen_product_transposed(g_NO, ctx.weight)
        saved = ctx.saved_tensors  # asked for once: activation recomputation unpacks them only once
        if saved:
            x_NI, a_RI, b_OR, h_NR = saved
            dtype = g_NO.dtype
            kept = None if ctx.dropout_seed is None else keep_mask(x_NI, ctx.dropout, ctx.dropout_seed)
            gb_NR = (g_NO @ b_OR.to(dtype)).mul_(ctx.scale)
            if ctx.needs_input_grad[1]:
                grad_a = gb_NR.T @ (x_NI if kept is None else x_NI * kept)
            if ctx.needs_input_grad[2]:
                grad_b = (g_NO.T @ h_NR).mul_(ctx.scale)
            if grad_x is not None:
                if kept is None:
                    grad_x.addmm_(gb_NR, a_RI.to(dtype))
                else:
                    grad_x.addcmul_(gb_NR @ a_RI.to(dtype), kept)
        return grad_x, _widen(grad_a), _widen(grad_b), None, None, None, None


def _widen(grad: torch.Tensor | None) -> torch.Tensor | None:
    """Adapter gradients leave in at least float32; autograd narrows them where a parameter asks."""
    return None if grad is None else grad.to(torch.promote_types(grad.dtype, torch.float32))


class _Widened(torch.autograd.Function):
    """A parameter in a wider dtype, whose gradient comes back unrounded; see `widened`."""

    @staticmethod
    def forward(ctx: Any, stored: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return stored.to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


def widened(stored: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`stored.to(dtype)`, but the gradient keeps `dtype`; `Tensor.to` would round it back."""
    result: torch.Tensor = _Widened.apply(stored, dtype)  # type: ignore[no-untyped-call]
    return result


def low_rank_linear(
    x_NI: torch.Tensor,
    weight: FrozenWeight,
    a_RI: torch.Tensor | None = None,
    b_OR: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
    dropout: float = 0.0,
    with_wa: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A frozen linear layer with a low-rank update, before magnitude and bias.

    u = W x + c B A drop(x)      (docs/math.md §2)

    Kept for backward: x_NI, h = A x (N, R) and the factors; nothing of the size of W.

    Args:
        x_NI: (N, I), compute dtype.
        weight: the frozen W, (O, I).
        a_RI, b_OR: factors of any floating dtype, both or neither; their gradients are float32.
        scale: c.
        dropout: probability of dropping an input of the low-rank branch.
        with_wa: also return W Aᵀ, at no further dequantization.
    Returns: u (N, O) in the dtype of x_NI; W Aᵀ (O, R) or None, not differentiable.
    Source: LoRA, arXiv:2106.09685 §4.1; QLoRA, arXiv:2305.14314 §3.
    """
    result: tuple[torch.Tensor, torch.Tensor | None] = _LowRankLinear.apply(  # type: ignore[no-untyped-call]
        x_NI, a_RI, b_OR, weight, scale, dropout, with_wa
    )
    return result


class _ScaleRows(torch.autograd.Function):
    """y = s * u + bias; see `scale_rows`."""

    @staticmethod
    def forward(ctx: Any, u_NO: torch.Tensor, s_O: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(u_NO, s_O)
        y_NO = torch.empty_like(u_NO)
        # The product is rounded to the compute dtype once: a bf16 s would lose small magnitude moves.
        torch.mul(u_NO, s_O, out=y_NO)
        if bias_O is not None:
            y_NO += bias_O
        return y_NO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_NO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        u_NO, s_O = ctx.saved_tensors
        grad_u = torch.mul(g_NO, s_O, out=torch.empty_like(g_NO))
        grad_s = torch.linalg.vecdot(g_NO.to(s_O.dtype), u_NO.to(s_O.dtype), dim=0)
        return grad_u, grad_s, None


def scale_rows(u_NO: torch.Tensor, s_O: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
    """Apply the magnitude: y = s * u + bias.  The bias is frozen and never scaled.

    Args:
        u_NO: (N, O), compute dtype.
        s_O: (O,) m / ||W + c BA||, at least float32.
        bias_O: (O,) or None.
    Returns: (N, O), dtype of u_NO.
    Source: DoRA, arXiv:2402.09353 eq. 5.
    """
    result: torch.Tensor = _ScaleRows.apply(u_NO, s_O, bias_O)  # type: ignore[no-untyped-call]
    return result
