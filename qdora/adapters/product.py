"""The product of an adapted layer and its backward pass: one pass over the tiles of W in each.

    y = s ∘ (W x + c B A drop(x)) + bias,     s = m / ||W + c B A||_row

    N tokens of the batch   I in_features   O out_features   R rank

W is only ever seen as row tiles.  BA, an identity matrix, or a whole dequantized W never exist:
backward asks for the tiles again (docs/math.md derives every formula here).

A 16-bit output is rounded once, and everything small is in the sum before that: a rounded W x would take in
neither a small update nor a small move of s (docs/math.md §4).  So s scales the tile, and the update is
part of the tile or of what the product is added onto.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from qdora.adapters import kernels, tiles
from qdora.adapters.base import Factors
from qdora.adapters.dropout import draw_seed, keep_mask
from qdora.adapters.tiles import OFF_GRID, has_kernels, scales_output
from qdora.quant.base import FrozenWeight


class Scaling(NamedTuple):
    """The magnitude's part of a layer.

    Attributes:
        initial_O: (O,) frozen, at least float32.
        offset_O: (O,) trained; m = initial + offset.
        norm_O: ||W + c BA||, at least float32: a tensor, differentiable where its exact gradient is
            wanted, or, where `scales_output`, what makes it a constant from the (O, R) product W Aᵀ of the
            same pass.
    """

    initial_O: torch.Tensor
    offset_O: torch.Tensor
    norm_O: torch.Tensor | Callable[[torch.Tensor], torch.Tensor]


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


def _takes_update(weight: FrozenWeight, given: Operands, dropout: float, dtype: torch.dtype) -> bool:
    """Whether the update is part of the tiles: two thin products less, where a kernel forms the tiles anyway.

    Not with dropout, whose update has other inputs than W; not with VeRA's vectors; and not where W is
    used as it is stored.
    """
    if given.b_OR is None or given.inner_R is not None or dropout or not has_kernels(dtype, weight.device):
        return False
    stored = weight.stored()
    as_it_is = given.offset_O is None and stored is not None and stored.values.dtype == dtype
    return stored is not None and not as_it_is


def _product(
    x_NI: torch.Tensor,
    w_tiles: Iterator[tuple[slice, torch.Tensor]],
    onto_NO: torch.Tensor | None,
    alpha: float,
    a_RI: torch.Tensor | None,
    out_features: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """alpha W x added onto a tensor, which becomes the result, and W Aᵀ where A is given, in one pass.

    Returns: (N, O) in the dtype of x_NI; (O, R) or None.
    """
    y_NO = x_NI.new_empty(x_NI.shape[0], out_features) if onto_NO is None else onto_NO
    beta = 0 if onto_NO is None else 1
    wa_OR = None if a_RI is None else x_NI.new_empty(out_features, a_RI.shape[0])
    for rows, w_tile in w_tiles:
        if a_RI is not None and wa_OR is not None:
            # First, while the fresh tile is still in the cores' own caches.
            torch.mm(w_tile, a_RI.T, out=wa_OR[rows])
        y_NO[:, rows].addmm_(x_NI, w_tile.T, beta=beta, alpha=alpha)
    return y_NO, wa_OR


def _product_transposed(
    g_NO: torch.Tensor,
    w_tiles: Iterator[tuple[slice, torch.Tensor]],
    onto_NI: torch.Tensor | None,
    alpha: float,
) -> torch.Tensor:
    """alpha g W added onto a tensor: (N, I) in the dtype of g_NO, the sum over tiles in at least float32."""
    wide = _wide_dtype(g_NO.dtype)
    total_NI = onto_NI
    for i, (rows, w_tile) in enumerate(w_tiles):
        part_NO = g_NO[:, rows]
        if total_NI is None:
            total_NI = _mm(part_NO, w_tile, alpha)
        elif i == 0 or g_NO.dtype == wide:
            total_NI.addmm_(part_NO, w_tile, alpha=alpha)
        else:
            total_NI = total_NI.to(wide).add_(part_NO @ w_tile, alpha=alpha)
    assert total_NI is not None
    return total_NI.to(g_NO.dtype)


def _mm(left: torch.Tensor, right: torch.Tensor, alpha: float) -> torch.Tensor:
    """alpha times a product, rounded once."""
    if alpha == 1:
        return left @ right
    return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=alpha)


class _AdaptedProduct(torch.autograd.Function):
    """See `adapted_product`.  One function: a further autograd node costs as much as a small product.

    `row_scale_O` is s times a factor f, which is `OFF_GRID` where a 16-bit tile moves with training, else 1;
    every product with it takes the factor back in its alpha, and the scale c enters there too.
    """

    @staticmethod
    def forward(
        ctx: Any, settings: ProductSettings, x_NI: torch.Tensor, *tensors: torch.Tensor | None
    ) -> torch.Tensor:
        given, weight, dtype = Operands(*tensors), settings.weight, x_NI.dtype
        scales_after = scales_output(dtype, x_NI.device)
        in_tile = _takes_update(weight, given, settings.dropout, dtype)
        factor = OFF_GRID if dtype.itemsize < 4 and (in_tile or given.offset_O is not None) else 1.0
        m_O = row_scale_O = None
        if given.offset_O is not None and settings.initial_O is not None:
            m_O = settings.initial_O + given.offset_O
            if given.norm_O is not None:
                row_scale_O = m_O / given.norm_O
        if factor != 1:
            row_scale_O = _times(row_scale_O, factor, weight)
        tile_scale_O = None if scales_after else row_scale_O
        a_cast = None if given.a_RI is None else given.a_RI.to(dtype)
        update = small_NO = h_NR = dropout_seed = None
        if in_tile:
            assert given.a_RI is not None
            assert given.b_OR is not None
            update = Factors(given.a_RI, given.b_OR, None, None, settings.scale)
        elif a_cast is not None and given.b_OR is not None:
            kept_NI = x_NI
            if settings.dropout:
                dropout_seed = draw_seed()
                kept_NI = x_NI * keep_mask(x_NI, x_NI.shape[1], settings.dropout, dropout_seed)
            h_NR = kept_NI @ a_cast.T
            inner_NR = h_NR if given.inner_R is None else h_NR * given.inner_R.to(dtype)
            b_scaled = _scaled_rows(given.b_OR, given.outer_O, tile_scale_O, dtype)
            small_NO = _mm(inner_NR, b_scaled.T, settings.scale / factor)
        w_tiles = tiles.adapted_tiles(weight, dtype, tile_scale_O, update)
        a_along = None if settings.norm_of is None else a_cast
        y_NO, wa_OR = _product(x_NI, w_tiles, small_NO, 1 / factor, a_along, weight.out_features)
        if m_O is not None and scales_after:
            if settings.norm_of is not None and wa_OR is not None:
                row_scale_O = m_O / settings.norm_of(wa_OR)
            assert row_scale_O is not None
            # In place: the output itself is kept for backward, and no further tensor of its size.  Not in a
            # graph: that of torch 2.11 loses the gradient of an output that was changed in place.
            y_NO = y_NO * row_scale_O if torch.compiler.is_compiling() else y_NO.mul_(row_scale_O)
        needs = Operands(*ctx.needs_input_grad[2:])
        needs_x = given.w_OI is not None or (given.a_RI is not None and (in_tile or needs.a_RI))
        ctx.save_for_backward(
            x_NI if needs_x else None,
            None if m_O is None else y_NO,
            *(given.a_RI, given.b_OR, given.inner_R, given.outer_O, h_NR, m_O, row_scale_O, dropout_seed),
        )
        ctx.settings, ctx.in_tile, ctx.factor = settings, in_tile, factor
        if given.bias_O is None:
            return y_NO
        if m_O is None:
            return y_NO.add_(given.bias_O)
        return (y_NO + given.bias_O).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_NO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # Asked for once: activation recomputation unpacks the saved tensors only once.
        x_NI, y_NO, a_RI, b_OR, inner_R, outer_O, h_NR, m_O, row_scale_O, dropout_seed = ctx.saved_tensors
        settings: ProductSettings = ctx.settings
        needs = Operands(*ctx.needs_input_grad[2:])
        grads: dict[str, torch.Tensor] = {}
        update = small_NI = None
        if y_NO is not None:
            # Σ g ∘ u / n with u = y / s and s n = m.  A magnitude of exactly 0 has y = 0: the least number
            # makes its gradient 0 instead of 0/0.
            grads["offset_O"] = kernels.column_dot(g_NO, y_NO) / (m_O + torch.finfo(m_O.dtype).tiny)
            if needs.norm_O:
                grads["norm_O"] = row_scale_O * grads["offset_O"] * (-1 / ctx.factor)
        if a_RI is not None:
            factors = Factors(a_RI, b_OR, inner_R, outer_O, settings.scale / ctx.factor)
            mask_NI = None
            if dropout_seed is not None:
                mask_NI = keep_mask(g_NO, a_RI.shape[1], settings.dropout, dropout_seed)
            a_cast = a_RI.to(g_NO.dtype)
            h_NR = x_NI @ a_cast.T if h_NR is None else h_NR
            of_factors, back_NR = _factor_gradients(g_NO, x_NI, h_NR, row_scale_O, factors, needs, mask_NI)
            grads |= of_factors
            if ctx.in_tile:
                update = Factors(a_RI, b_OR, None, None, settings.scale)
            elif ctx.needs_input_grad[1]:
                small_NI = back_NR @ a_cast if mask_NI is None else (back_NR @ a_cast).mul_(mask_NI)
        grad_x = None
        if ctx.needs_input_grad[1]:
            w_tiles = tiles.adapted_tiles(settings.weight, g_NO.dtype, row_scale_O, update)
            grad_x = _product_transposed(g_NO, w_tiles, small_NI, 1 / ctx.factor)
        if needs.w_OI:
            grads["w_OI"] = _wide(g_NO.T @ x_NI)
        if needs.bias_O:
            grads["bias_O"] = _wide(g_NO).sum(0)
        return None, grad_x, *(grads.get(name) for name in Operands._fields)


def _factor_gradients(
    g_NO: torch.Tensor,
    x_NI: torch.Tensor | None,
    h_NR: torch.Tensor,
    row_scale_O: torch.Tensor | None,
    factors: Factors,
    needs: Operands,
    mask_NI: torch.Tensor | None,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Gradients of A, B and VeRA's vectors, and c diag(inner) Bᵀ diag(s outer) g, which flows on through A.

    Args:
        h_NR: A drop(x).
        row_scale_O: f s; ones where None.
        factors: their scale is c / f.
        needs: which gradients are wanted.
    Returns: gradients by the names of `Operands`; (N, R) in the dtype of g_NO.
    """
    dtype, grads = g_NO.dtype, {}
    back_NR = _mm(g_NO, _scaled_rows(factors.b_OR, factors.outer_O, row_scale_O, dtype), factors.scale)
    inner_NR = h_NR
    if factors.inner_R is not None:
        if needs.inner_R:
            grads["inner_R"] = torch.linalg.vecdot(_wide(back_NR), _wide(h_NR), dim=0)
        inner_R = factors.inner_R.to(dtype)
        back_NR *= inner_R
        inner_NR = h_NR * inner_R
    if needs.a_RI:
        assert x_NI is not None
        grads["a_RI"] = _wide(back_NR.T @ (x_NI if mask_NI is None else x_NI * mask_NI))
    if needs.b_OR or needs.outer_O:
        # (hᵀ g)ᵀ: on CPUs the faster way round where O is the long side.
        gh_OR = _mm(inner_NR.T, g_NO, factors.scale).T
        if needs.b_OR:
            grads["b_OR"] = _scaled_rows(gh_OR, factors.outer_O, row_scale_O)
        if needs.outer_O:
            grad_outer = torch.linalg.vecdot(_wide(gh_OR), factors.b_OR.to(_wide_dtype(gh_OR.dtype)))
            grads["outer_O"] = grad_outer if row_scale_O is None else grad_outer * row_scale_O
    return grads, back_NR


def _times(scale_O: torch.Tensor | None, factor: float, weight: FrozenWeight) -> torch.Tensor:
    """Row scales times a factor; the factor itself where there are none."""
    if scale_O is not None:
        return scale_O * factor
    return torch.full((weight.out_features,), factor, dtype=weight.norm_dtype, device=weight.device)


def _scaled_rows(
    b_OR: torch.Tensor,
    outer_O: torch.Tensor | None,
    scale_O: torch.Tensor | None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """diag(outer) diag(scale) B, rounded once to `dtype`; at least float32 where None."""
    dtype = dtype or _wide_dtype(b_OR.dtype)
    for rows_O in (outer_O, scale_O):
        if rows_O is not None:
            b_OR = b_OR * rows_O.to(_wide_dtype(dtype))[:, None]
    return b_OR.to(dtype)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """Adapter gradients leave in at least float32; autograd narrows them where a parameter asks."""
    return tensor.to(_wide_dtype(tensor.dtype))


def _wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


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
    there is a magnitude, h = A drop(x) (N, R) and vectors; nothing of the size of W.  Without a
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
    # A compiler joins this sum to the rest; within the function torch 2.11 would lose its gradient.
    bias_after_O = bias_O if torch.compiler.is_compiling() else None
    operands = (*of_update, offset_O, norm_O, trained_OI, None if bias_after_O is not None else bias_O)
    settings = ProductSettings(
        weight,
        scale=1.0 if factors is None else factors.scale,
        dropout=dropout,
        initial_O=None if scaling is None else scaling.initial_O,
        norm_of=norm_of,
    )
    result: torch.Tensor = _AdaptedProduct.apply(settings, x_NI, *operands)  # type: ignore[no-untyped-call]
    return result if bias_after_O is None else (result + bias_after_O).to(x_NI.dtype)
