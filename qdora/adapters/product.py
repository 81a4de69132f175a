"""The product of an adapted layer and its backward pass: one pass over the tiles of W in each.

    y = s ∘ (W x + c B A drop(x)) + bias,     s = m / ||W + c B A||_row

    N tokens of the batch   I in_features   O out_features   R rank

W is only ever seen as row tiles.  BA, an identity matrix, or a whole dequantized W never exist:
backward asks for the tiles again (docs/math.md derives every formula here).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from qdora.adapters.base import Factors
from qdora.quant.base import FrozenWeight, rows_per_tile


class Scaling(NamedTuple):
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


class Operands(NamedTuple):
    """The differentiable inputs of the product beside x; None where a layer has no such part.

    Attributes:
        a_RI, b_OR, inner_R, outer_O: as in `Factors`.
        offset_O: the trained part of the magnitude.
        norm_O: ||W + c BA||, where it is known before the product.
        w_OI: the parameter that the frozen weight reads, where W itself is trained.
        bias_O: added after s.
    """

    a_RI: torch.Tensor | None = None
    b_OR: torch.Tensor | None = None
    inner_R: torch.Tensor | None = None
    outer_O: torch.Tensor | None = None
    offset_O: torch.Tensor | None = None
    norm_O: torch.Tensor | None = None
    w_OI: torch.Tensor | None = None
    bias_O: torch.Tensor | None = None


@dataclass(frozen=True)
class ProductSettings:
    """What the product needs beside tensors that may have a gradient.

    Attributes:
        weight: W, (O, I).
        scale: c.
        dropout: probability of dropping an input of the low-rank branch.
        initial_O: the frozen part of the magnitude; None where there is none.
        norm_of: makes the norm from W Aᵀ, (O, R), where it is not known before the product.
    """

    weight: FrozenWeight
    scale: float = 1.0
    dropout: float = 0.0
    initial_O: torch.Tensor | None = None
    norm_of: Callable[[torch.Tensor], torch.Tensor] | None = None


class _AdaptedProduct(torch.autograd.Function):
    """See `adapted_product`.  One function: a further autograd node costs as much as a small product."""

    @staticmethod
    def forward(
        ctx: Any, settings: ProductSettings, x_NI: torch.Tensor, *tensors: torch.Tensor | None
    ) -> torch.Tensor:
        given = Operands(*tensors)
        dtype = x_NI.dtype
        a_cast = None if given.a_RI is None else given.a_RI.to(dtype)
        u_NO, wa_OR = frozen_product(x_NI, settings.weight, None if settings.norm_of is None else a_cast)
        h_NR = None
        ctx.dropout_seed = None
        if a_cast is not None and given.b_OR is not None:
            kept_NI = x_NI
            if settings.dropout:
                ctx.dropout_seed = draw_seed()
                kept_NI = x_NI * keep_mask(x_NI, x_NI.shape[1], settings.dropout, ctx.dropout_seed)
            h_NR = (kept_NI @ a_cast.T).mul_(settings.scale)
            inner_NR = h_NR if given.inner_R is None else h_NR * given.inner_R.to(dtype)
            u_NO.addmm_(inner_NR, _outer(given.b_OR, given.outer_O, dtype).T)
        y_NO, m_O, s_O = u_NO, None, None
        if given.offset_O is not None and settings.initial_O is not None:
            norm_O = given.norm_O
            if settings.norm_of is not None and wa_OR is not None:
                norm_O = settings.norm_of(wa_OR)
            assert norm_O is not None
            m_O = settings.initial_O + given.offset_O
            s_O = m_O / norm_O
            # In place: the output itself is kept for backward, and no further tensor of its size.  The
            # product is rounded to the compute dtype once: a bf16 s would lose small magnitude moves.
            y_NO = u_NO.mul_(s_O)
        needs = Operands(*ctx.needs_input_grad[2:])
        needs_x = given.w_OI is not None or (given.a_RI is not None and needs.a_RI)
        ctx.save_for_backward(
            x_NI if needs_x else None,
            None if s_O is None else y_NO,
            *(given.a_RI, given.b_OR, given.inner_R, given.outer_O, h_NR, m_O, s_O),
        )
        ctx.settings = settings
        if given.bias_O is None:
            return y_NO
        if s_O is None:
            return y_NO.add_(given.bias_O)
        return torch.add(y_NO, given.bias_O, out=torch.empty_like(y_NO))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_NO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # Asked for once: activation recomputation unpacks the saved tensors only once.
        x_NI, y_NO, a_RI, b_OR, inner_R, outer_O, h_NR, m_O, s_O = ctx.saved_tensors
        settings: ProductSettings = ctx.settings
        needs = Operands(*ctx.needs_input_grad[2:])
        grads: dict[str, torch.Tensor] = {}
        grad_x = None
        if y_NO is not None:
            # Σ g ∘ u / n with u = y / s and s n = m.  A magnitude of exactly 0 has y = 0: the least number
            # makes its gradient 0 instead of 0/0.
            grads["offset_O"] = column_dot(g_NO, y_NO) / (m_O + torch.finfo(m_O.dtype).tiny)
            if needs.norm_O:
                grads["norm_O"] = -s_O * grads["offset_O"]
        if ctx.needs_input_grad[1]:
            grad_x = frozen_product_transposed(g_NO, settings.weight, s_O)
        if a_RI is not None:
            mask = None
            if ctx.dropout_seed is not None:
                mask = keep_mask(g_NO, a_RI.shape[1], settings.dropout, ctx.dropout_seed)
            factors = Factors(a_RI, b_OR, inner_R, outer_O, settings.scale)
            of_factors, back_NR = _factor_gradients(g_NO, x_NI, h_NR, s_O, factors, needs, mask)
            grads |= of_factors
            if grad_x is not None:
                a_cast = a_RI.to(g_NO.dtype)
                grad_x = (
                    grad_x.addmm_(back_NR, a_cast)
                    if mask is None
                    else grad_x.addcmul_(back_NR @ a_cast, mask)
                )
        if needs.w_OI:
            grads["w_OI"] = _wide(g_NO.T @ x_NI)
        if needs.bias_O:
            grads["bias_O"] = _wide(g_NO).sum(0)
        return None, grad_x, *(grads.get(name) for name in Operands._fields)


def _factor_gradients(
    g_NO: torch.Tensor,
    x_NI: torch.Tensor | None,
    h_NR: torch.Tensor,
    s_O: torch.Tensor | None,
    factors: Factors,
    needs: Operands,
    mask_NI: torch.Tensor | None,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Gradients of A, B and VeRA's vectors, and c diag(inner) Bᵀ diag(s outer) g, which flows on through A.

    Args:
        h_NR: c A drop(x).
        needs: which gradients are wanted.
    Returns: gradients by the names of `Operands`; (N, R) in the dtype of g_NO.
    """
    dtype, grads = g_NO.dtype, {}
    outer_s_O = _product(factors.outer_O, s_O)
    back_NR = g_NO @ _outer(factors.b_OR, outer_s_O, dtype)
    if needs.inner_R:
        grads["inner_R"] = torch.linalg.vecdot(_wide(back_NR), _wide(h_NR), dim=0)
    back_NR *= factors.scale
    inner_NR = h_NR
    if factors.inner_R is not None:
        inner_R = factors.inner_R.to(dtype)
        back_NR *= inner_R
        inner_NR = h_NR * inner_R
    if needs.a_RI:
        assert x_NI is not None
        grads["a_RI"] = _wide(back_NR.T @ (x_NI if mask_NI is None else x_NI * mask_NI))
    if needs.b_OR or needs.outer_O:
        # (hᵀ g)ᵀ: on CPUs the faster way round where O is the long side.
        gh_OR = _wide(inner_NR.T @ g_NO).T
        if needs.b_OR:
            grads["b_OR"] = gh_OR if outer_s_O is None else gh_OR * outer_s_O[:, None]
        if needs.outer_O:
            grad_outer = torch.linalg.vecdot(gh_OR, factors.b_OR.to(gh_OR.dtype))
            grads["outer_O"] = grad_outer if s_O is None else grad_outer * s_O
    return grads, back_NR


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
    if outer_O is None:
        return b_OR.to(dtype)
    wide = torch.promote_types(b_OR.dtype, dtype)
    return (b_OR.to(wide) * outer_O[:, None]).to(dtype)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """Adapter gradients leave in at least float32; autograd narrows them where a parameter asks."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def adapted_product(
    x_NI: torch.Tensor,
    weight: FrozenWeight,
    *,
    factors: Factors | None = None,
    scaling: Scaling | None = None,
    bias_O: torch.Tensor | None = None,
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
        factors: of the low-rank update; None where there is none.
        scaling: the magnitude; None where there is none.
        bias_O: (O,), added after s.
        dropout: probability of dropping an input of the low-rank branch.
    Returns: (N, O), dtype of x_NI.  Gradients of all but x are in at least float32.
    Source: LoRA, arXiv:2106.09685 §4.1; DoRA, arXiv:2402.09353 §4; VeRA, arXiv:2310.11454 §3.
    """
    trained_OI = weight.trained
    assert trained_OI is None or scaling is None, "the norm of a trained W is not followed"
    norm_O = norm_of = None
    if scaling is not None:
        norm_O = scaling.norm_O if isinstance(scaling.norm_O, torch.Tensor) else None
        norm_of = None if isinstance(scaling.norm_O, torch.Tensor) else scaling.norm_O
    offset_O = None if scaling is None else scaling.offset_O
    of_update = (None, None, None, None) if factors is None else factors[:4]
    operands = (*of_update, offset_O, norm_O, trained_OI, bias_O)
    settings = ProductSettings(
        weight,
        scale=1.0 if factors is None else factors.scale,
        dropout=dropout,
        initial_O=None if scaling is None else scaling.initial_O,
        norm_of=norm_of,
    )
    result: torch.Tensor = _AdaptedProduct.apply(settings, x_NI, *operands)  # type: ignore[no-untyped-call]
    return result
