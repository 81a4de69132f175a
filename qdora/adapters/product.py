"""The product of an adapted layer and its backward pass: one pass over the tiles of W in each.

    y = s ∘ (W x + c B A drop(x)) + bias,     s = m / ||W + c B A||_row

    N tokens of the batch   I in_features   O out_features   R rank

W is only ever seen as row tiles.  BA, an identity matrix, or a whole dequantized W never exist:
backward asks for the tiles again (docs/math.md derives every formula here).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from qdora.adapters.update import Update
from qdora.quant.weight import FrozenWeight, rows_per_tile


@dataclass(frozen=True)
class Scaling:
    """The magnitude's part of a layer.

    Attributes:
        initial_O: (O,) frozen, at least float32.
        offset_O: (O,) trained; m = initial + offset.
        norm_O: ||W + c BA||, at least float32: a tensor, differentiable where its exact gradient is
            wanted, or what makes it a constant from the (O, R) product W Aᵀ of the same pass.
    """

    initial_O: torch.Tensor
    offset_O: torch.Tensor
    norm_O: torch.Tensor | Callable[[torch.Tensor], torch.Tensor]


def frozen_product(
    x_NI: torch.Tensor, weight: FrozenWeight, a_RI: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """W x, and W Aᵀ where A is given: one pass over the tiles serves both.

    Returns: (N, O) in the dtype of x_NI; (O, R) or None.
    """
    u_NO = x_NI.new_empty(x_NI.shape[0], weight.out_features)
    wa_OR = None if a_RI is None else x_NI.new_empty(weight.out_features, a_RI.shape[0])
    for rows, w_tile in weight.tiles(x_NI.dtype):
        if a_RI is not None and wa_OR is not None:
            # First, while the fresh tile is still in the cores' own caches.
            torch.mm(w_tile, a_RI.T, out=wa_OR[rows])
        torch.mm(x_NI, w_tile.T, out=u_NO[:, rows])
    return u_NO, wa_OR


def frozen_product_transposed(
    g_NO: torch.Tensor, weight: FrozenWeight, s_O: torch.Tensor | None = None
) -> torch.Tensor:
    """(s ∘ g) W: (N, I) in the dtype of g_NO, the sum over tiles accumulated in at least float32.

    s scales the rows of W, not the columns of g: for NF4 that is a product with the block scales.
    """
    total_NI: torch.Tensor | None = None
    for rows, w_tile in weight.tiles(g_NO.dtype, s_O):
        part_NO = g_NO[:, rows]
        if total_NI is None:
            total_NI = part_NO @ w_tile
            if w_tile.shape[0] < weight.out_features:
                total_NI = total_NI.to(torch.promote_types(g_NO.dtype, torch.float32))
        elif total_NI.dtype == g_NO.dtype:
            total_NI.addmm_(part_NO, w_tile)
        else:
            total_NI += part_NO @ w_tile
    assert total_NI is not None
    return total_NI.to(g_NO.dtype)


def keep_mask(like: torch.Tensor, inputs: int, dropout: float, seed: int) -> torch.Tensor:
    """(N, inputs) of 0 and 1/(1-p), dtype and rows of `like`; p is `dropout` rounded to 16 bits.

    The same for the same seed: backward draws it again, nothing is kept.  Four decisions come from
    each 64 random bits, since a CPU draws them one after the other.
    """
    generator = torch.Generator(device=like.device).manual_seed(seed)
    count = like.shape[0] * inputs
    bits = torch.empty(-(-count // 4), dtype=torch.int64, device=like.device)
    bits.random_(-(2**63), None, generator=generator)
    dropped = min(round(dropout * 2**16), 2**16 - 1)
    kept = bits.view(torch.int16)[:count].view(-1, inputs) >= dropped - 2**15
    return kept.to(like.dtype).mul_(2**16 / (2**16 - dropped))


def draw_seed() -> int:
    """A seed from the CPU generator: activation recomputation restores it, and no device waits."""
    return int(torch.randint(2**62, ()).item())


class _AdaptedProduct(torch.autograd.Function):
    """See `adapted_product`.  One function: a further autograd node costs as much as a small product."""

    @staticmethod
    def forward(
        ctx: Any,
        x_NI: torch.Tensor,
        a_RI: torch.Tensor | None,
        b_OR: torch.Tensor | None,
        inner_R: torch.Tensor | None,
        outer_O: torch.Tensor | None,
        offset_O: torch.Tensor | None,
        norm_O: torch.Tensor | None,
        w_OI: torch.Tensor | None,
        bias_O: torch.Tensor | None,
        weight: FrozenWeight,
        scale: float,
        dropout: float,
        initial_O: torch.Tensor | None,
        norm_of: Callable[[torch.Tensor], torch.Tensor] | None,
    ) -> torch.Tensor:
        dtype = x_NI.dtype
        a_cast = None if a_RI is None else a_RI.to(dtype)
        u_NO, wa_OR = frozen_product(x_NI, weight, None if norm_of is None else a_cast)
        h_NR = None
        ctx.dropout_seed = None
        if a_cast is not None and b_OR is not None:
            kept_NI = x_NI
            if dropout:
                ctx.dropout_seed = draw_seed()
                kept_NI = x_NI * keep_mask(x_NI, x_NI.shape[1], dropout, ctx.dropout_seed)
            h_NR = (kept_NI @ a_cast.T).mul_(scale)
            inner_NR = h_NR if inner_R is None else h_NR * inner_R.to(dtype)
            u_NO.addmm_(inner_NR, _outer(b_OR, outer_O, dtype).T)
        y_NO, m_O, s_O = u_NO, None, None
        if offset_O is not None and initial_O is not None:
            if norm_of is not None and wa_OR is not None:
                norm_O = norm_of(wa_OR)
            assert norm_O is not None
            m_O = initial_O + offset_O
            s_O = m_O / norm_O
            # In place: the output itself is kept for backward, and no further tensor of its size.  The
            # product is rounded to the compute dtype once: a bf16 s would lose small magnitude moves.
            y_NO = u_NO.mul_(s_O)
        needs_x = w_OI is not None or (a_RI is not None and ctx.needs_input_grad[1])
        ctx.save_for_backward(
            x_NI if needs_x else None,
            None if s_O is None else y_NO,
            *(a_RI, b_OR, inner_R, outer_O, h_NR, m_O, s_O),
        )
        ctx.weight, ctx.scale, ctx.dropout = weight, scale, dropout
        if bias_O is None:
            return y_NO
        return y_NO.add_(bias_O) if s_O is None else torch.add(y_NO, bias_O, out=torch.empty_like(y_NO))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_NO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # Asked for once: activation recomputation unpacks the saved tensors only once.
        x_NI, y_NO, a_RI, b_OR, inner_R, outer_O, h_NR, m_O, s_O = ctx.saved_tensors
        needs = ctx.needs_input_grad
        dtype, scale = g_NO.dtype, ctx.scale
        grad_x = grad_a = grad_b = grad_inner = grad_outer = grad_offset = grad_norm = grad_w = None
        if y_NO is not None:
            # Σ g ∘ u / n with u = y / s and s n = m.  A magnitude of exactly 0 has y = 0: the least number
            # makes its gradient 0 instead of 0/0.
            grad_offset = column_dot(g_NO, y_NO) / (m_O + torch.finfo(m_O.dtype).tiny)
            if needs[6]:
                grad_norm = -s_O * grad_offset
        if needs[0]:
            grad_x = frozen_product_transposed(g_NO, ctx.weight, s_O)
        if a_RI is not None:
            kept = None
            if ctx.dropout_seed is not None:
                kept = keep_mask(g_NO, a_RI.shape[1], ctx.dropout, ctx.dropout_seed)
            outer_s_O = _product(outer_O, s_O)
            back_NR = g_NO @ _outer(b_OR, outer_s_O, dtype)
            if needs[3]:
                grad_inner = torch.linalg.vecdot(_wide(back_NR), _wide(h_NR), dim=0)
            back_NR *= scale
            inner_NR = h_NR
            if inner_R is not None:
                back_NR *= inner_R.to(dtype)
                inner_NR = h_NR * inner_R.to(dtype)
            if needs[1]:
                grad_a = _wide(back_NR.T @ (x_NI if kept is None else x_NI * kept))
            if needs[2] or needs[4]:
                # (hᵀ g)ᵀ: on CPUs the faster way round where O is the long side.
                gh_OR = _wide(inner_NR.T @ g_NO).T
                if needs[2]:
                    grad_b = gh_OR if outer_s_O is None else gh_OR * outer_s_O[:, None]
                if needs[4]:
                    grad_outer = torch.linalg.vecdot(gh_OR, _wide(b_OR))
                    grad_outer = grad_outer if s_O is None else grad_outer * s_O
            if grad_x is not None:
                if kept is None:
                    grad_x.addmm_(back_NR, a_RI.to(dtype))
                else:
                    grad_x.addcmul_(back_NR @ a_RI.to(dtype), kept)
        if needs[7]:
            grad_w = _wide(g_NO.T @ x_NI)
        grad_bias = _wide(g_NO).sum(0) if needs[8] else None
        grads = (grad_x, grad_a, grad_b, grad_inner, grad_outer, grad_offset, grad_norm, grad_w, grad_bias)
        return *grads, None, None, None, None, None


def column_dot(g_NO: torch.Tensor, y_NO: torch.Tensor) -> torch.Tensor:
    """Σ_N g ∘ y: (O,) in at least float32, its products held for one tile of tokens at a time."""
    dtype = torch.promote_types(g_NO.dtype, torch.float32)
    step = rows_per_tile(g_NO.shape[0], g_NO.shape[1], dtype, g_NO.device)
    total_O: torch.Tensor | None = None
    for g_tile, y_tile in zip(g_NO.split(step), y_NO.split(step), strict=True):
        part_O = torch.linalg.vecdot(g_tile.to(dtype), y_tile.to(dtype), dim=0)
        total_O = part_O if total_O is None else total_O.add_(part_O)
    assert total_O is not None
    return total_O


def _product(first: torch.Tensor | None, second: torch.Tensor | None) -> torch.Tensor | None:
    """Of two vectors of which either may be missing, meaning ones."""
    if first is None or second is None:
        return second if first is None else first
    return first * second


def _outer(b_OR: torch.Tensor, outer_O: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    return b_OR.to(dtype) if outer_O is None else (b_OR * outer_O[:, None]).to(dtype)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """Adapter gradients leave in at least float32; autograd narrows them where a parameter asks."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def adapted_product(
    x_NI: torch.Tensor,
    weight: FrozenWeight,
    *,
    update: Update | None = None,
    scaling: Scaling | None = None,
    bias_O: torch.Tensor | None = None,
    trained_OI: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """A linear layer with a low-rank update and a magnitude.

    y = s ∘ (W x + c B A drop(x)) + bias,   s = m / ||W + c BA||_row      (docs/math.md §2)

    Kept for backward: x (N, I) where A or W itself is trained, the output before its bias (N, O) where
    there is a magnitude, h = c A drop(x) (N, R) and vectors; nothing of the size of W.  Without a
    bias the tensor kept is the output itself: nobody may change it in place before backward.

    Args:
        x_NI: (N, I), compute dtype.
        weight: W, (O, I).
        update: the direction; None where there is none.
        scaling: the magnitude; None where there is none.
        bias_O: (O,), added after s.
        trained_OI: the parameter that `weight` reads, where W itself is trained.
        dropout: probability of dropping an input of the low-rank branch.
    Returns: (N, O), dtype of x_NI.  Gradients of all but x are in at least float32.
    Source: LoRA, arXiv:2106.09685 §4.1; DoRA, arXiv:2402.09353 §4; VeRA, arXiv:2310.11454 §3.
    """
    assert trained_OI is None or scaling is None, "the norm of a trained W is not followed"
    factors = (None, None, None, None) if update is None else update[:4]
    norm = None if scaling is None else scaling.norm_O
    rides_along = callable(norm)
    result: torch.Tensor = _AdaptedProduct.apply(  # type: ignore[no-untyped-call]
        x_NI,
        *factors,
        None if scaling is None else scaling.offset_O,
        None if rides_along else norm,
        trained_OI,
        bias_O,
        weight,
        1.0 if update is None else update.scale,
        dropout,
        None if scaling is None else scaling.initial_O,
        norm if rides_along else None,
    )
    return result
