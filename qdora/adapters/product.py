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

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from qdora.adapters import kernels, tiles
from qdora.adapters.base import Factors
from qdora.adapters.dropout import draw_seed, keep_mask
from qdora.adapters.tiles import OFF_GRID, has_kernels, mm_scaled, scales_output
from qdora.quant.base import FrozenWeight


class Scaling(NamedTuple):
    """The magnitude's part of a layer.

    Attributes:
        initial_O: (O,) frozen, at least float32.
        offset_O: (O,) trained; m = initial + offset.  None where m is frozen at its start.
        norm_O: ||W + c BA||, at least float32: a tensor, differentiable where its exact gradient is
            wanted, or, where `scales_output`, what makes it a constant from the (O, R) product W Aᵀ of the
            same pass.
    """

    initial_O: torch.Tensor
    offset_O: torch.Tensor | None
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
        initial_O: the frozen part of the magnitude; None where there is no magnitude.
        norm_of: makes the norm from W Aᵀ, (O, R), where it is not known before the product.
        bf16_operands: whether float32 operands of the products with W are rounded to bfloat16 (on a CPU).
    """

    weight: FrozenWeight
    scale: float = 1.0
    dropout: float = 0.0
    initial_O: torch.Tensor | None = None
    norm_of: Callable[[torch.Tensor], torch.Tensor] | None = None
    bf16_operands: bool = False


def _takes_update(settings: ProductSettings, given: Operands, dtype: torch.dtype) -> bool:
    """Whether the update is part of the tiles: two thin products less, where a kernel forms the tiles anyway.

    Not with dropout, whose update has other inputs than W; not with VeRA's vectors; and not where W is
    used as it is stored.
    """
    weight = settings.weight
    if given.b_OR is None or given.inner_R is not None or settings.dropout:
        return False
    if not has_kernels(dtype, weight.device):
        return False
    stored = weight.stored()
    as_it_is = settings.initial_O is None and stored is not None and stored.values.dtype == dtype
    return stored is not None and not as_it_is


def _outside_autocast(backward: Any) -> Any:
    """Backward within a caller's autocast would round what is summed in float32."""

    @wraps(backward)
    def plain(ctx: Any, g_NO: torch.Tensor) -> Any:
        if not torch.is_autocast_enabled(g_NO.device.type):
            return backward(ctx, g_NO)
        with torch.autocast(g_NO.device.type, enabled=False):
            return backward(ctx, g_NO)

    return plain


class _AdaptedProduct(torch.autograd.Function):
    """See `adapted_product`.  One function: a further autograd node costs as much as a small product.

    A 16-bit tile that moves with training is multiplied by the factor f = `OFF_GRID`, and so is s B; every
    product with one of them takes the factor back in its alpha, where the scale c enters too.
    """

    @staticmethod
    def forward(
        ctx: Any, settings: ProductSettings, x_NI: torch.Tensor, *tensors: torch.Tensor | None
    ) -> torch.Tensor:
        given, weight, dtype = Operands(*tensors), settings.weight, x_NI.dtype
        scales_after = scales_output(dtype, x_NI.device)
        in_16_bits = dtype.itemsize < 4 or settings.bf16_operands
        in_tile = _takes_update(settings, given, dtype)
        has_scale = settings.initial_O is not None
        factor = b_factor = OFF_GRID if in_16_bits and (in_tile or has_scale) else 1.0
        b_OR = None if given.b_OR is None else _outer_rows(given.b_OR, given.outer_O, dtype)
        m_O = s_O = b_scaled_OR = None
        if given.norm_O is not None:
            m_O, s_O, b_scaled_OR = _row_scale(settings, given, given.norm_O, b_OR, factor, dtype)
        elif b_OR is not None and not has_scale and _gates_16_bits(given, dtype):
            b_factor = OFF_GRID
            b_scaled_OR = (b_OR * b_factor).to(dtype)
        a_cast = None if given.a_RI is None else given.a_RI.to(dtype)
        update = small_NO = h_NR = dropout_seed = None
        if in_tile:
            assert given.a_RI is not None
            assert b_OR is not None
            update = Factors(given.a_RI, b_OR, None, None, settings.scale)
        elif a_cast is not None and b_OR is not None:
            kept_NI = x_NI
            if settings.dropout:
                dropout_seed = draw_seed()
                kept_NI = x_NI * keep_mask(x_NI, x_NI.shape[1], settings.dropout, dropout_seed)
            h_NR = kept_NI @ a_cast.T
            inner_NR = h_NR if given.inner_R is None else h_NR * given.inner_R.to(dtype)
            if scales_after or b_scaled_OR is None:
                small_NO = mm_scaled(inner_NR, b_OR.to(dtype).T, settings.scale)
            else:
                small_NO = mm_scaled(inner_NR, b_scaled_OR.T, settings.scale / b_factor)
        s_tile, tile_factor = (None, 1.0) if scales_after else (s_O, factor)
        w_tiles = tiles.adapted_tiles(weight, dtype, s_tile, update, tile_factor)
        a_along = None if settings.norm_of is None else a_cast
        y_NO, wa_OR = tiles.product(
            x_NI,
            w_tiles,
            weight.out_features,
            onto_NO=small_NO,
            alpha=1 / tile_factor,
            a_RI=a_along,
            bf16_operands=settings.bf16_operands,
        )
        if settings.norm_of is not None and wa_OR is not None:
            norm_O = settings.norm_of(wa_OR)
            m_O, s_O, b_scaled_OR = _row_scale(settings, given, norm_O, b_OR, factor, dtype)
        if scales_after and s_O is not None:
            # In place: the output itself is kept for backward, and no further tensor of its size.  Not in a
            # graph: that of torch 2.11 loses the gradient of an output that was changed in place.
            y_NO = y_NO * s_O if torch.compiler.is_compiling() else y_NO.mul_(s_O)
        needs = Operands(*ctx.needs_input_grad[2:])
        keeps_output = m_O is not None and (needs.offset_O or needs.norm_O)
        needs_x = given.w_OI is not None or (given.a_RI is not None and (in_tile or needs.a_RI))
        ctx.save_for_backward(
            x_NI if needs_x else None,
            y_NO if keeps_output else None,
            *(
                given.a_RI,
                given.b_OR,
                given.inner_R,
                given.outer_O,
                h_NR,
                m_O if keeps_output else None,
                s_O,
                b_scaled_OR,
                dropout_seed,
            ),
        )
        ctx.settings, ctx.in_tile, ctx.factor, ctx.b_factor = settings, in_tile, factor, b_factor
        if given.bias_O is None:
            return y_NO
        if not keeps_output:
            return y_NO.add_(given.bias_O)
        return (y_NO + given.bias_O).to(dtype)

    @staticmethod
    @_outside_autocast
    @once_differentiable
    def backward(ctx: Any, g_NO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # Asked for once: activation recomputation unpacks the saved tensors only once.
        x_NI, y_NO, a_RI, b_OR, inner_R, outer_O, h_NR, m_O, s_O, b_scaled_OR, seed = ctx.saved_tensors
        settings: ProductSettings = ctx.settings
        dtype, needs = g_NO.dtype, Operands(*ctx.needs_input_grad[2:])
        grads: dict[str, torch.Tensor] = {}
        inner_NR = update = small_NI = None
        if a_RI is not None:
            a_cast, mask_NI = a_RI.to(dtype), None
            if seed is not None:
                mask_NI = keep_mask(g_NO, a_RI.shape[1], settings.dropout, seed)
            h_NR = x_NI @ a_cast.T if h_NR is None else h_NR
            # c diag(inner) Bᵀ diag(s outer) g, which flows on through A.
            if b_scaled_OR is None:
                back_NR = mm_scaled(g_NO, _outer_rows(b_OR, outer_O, dtype).to(dtype), settings.scale)
            else:
                back_NR = mm_scaled(g_NO, b_scaled_OR, settings.scale / ctx.b_factor)
            inner_NR = h_NR
            if inner_R is not None:
                if needs.inner_R:
                    grads["inner_R"] = torch.linalg.vecdot(_wide(back_NR), _wide(h_NR), dim=0)
                back_NR *= inner_R.to(dtype)
                inner_NR = h_NR * inner_R.to(dtype)
            if needs.a_RI:
                grads["a_RI"] = mm_wide(back_NR.T, x_NI if mask_NI is None else x_NI * mask_NI)
            if ctx.in_tile:
                update = Factors(a_RI, _outer_rows(b_OR, outer_O, dtype), None, None, settings.scale)
            elif ctx.needs_input_grad[1]:
                small_NI = back_NR @ a_cast if mask_NI is None else (back_NR @ a_cast).mul_(mask_NI)
        trains_b = needs.b_OR or needs.outer_O
        if y_NO is not None or trains_b:
            grad_offset_O, grad_b_OR = kernels.output_gradients(
                g_NO, y_NO, m_O, inner_NR if trains_b else None, s_O, settings.scale
            )
            if grad_offset_O is not None:
                if needs.offset_O:
                    grads["offset_O"] = grad_offset_O
                if needs.norm_O:
                    grads["norm_O"] = -s_O * grad_offset_O
            if grad_b_OR is not None:
                if needs.b_OR:
                    grads["b_OR"] = _outer_rows(grad_b_OR, outer_O, dtype)
                if needs.outer_O:
                    grads["outer_O"] = torch.linalg.vecdot(grad_b_OR, b_OR.to(grad_b_OR.dtype))
        grad_x = None
        if ctx.needs_input_grad[1]:
            w_tiles = tiles.adapted_tiles(settings.weight, dtype, s_O, update, ctx.factor)
            grad_x = tiles.product_transposed(
                g_NO, w_tiles, onto_NI=small_NI, alpha=1 / ctx.factor, bf16_operands=settings.bf16_operands
            )
        if needs.w_OI:
            grads["w_OI"] = _wide(g_NO.T @ x_NI)
        if needs.bias_O:
            grads["bias_O"] = _wide(g_NO).sum(0)
        return None, grad_x, *(grads.get(name) for name in Operands._fields)


def _row_scale(
    settings: ProductSettings,
    given: Operands,
    norm_O: torch.Tensor,
    b_OR: torch.Tensor | None,
    factor: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """m, s = m / norm, and f s B in the dtype of the product."""
    assert settings.initial_O is not None
    return kernels.row_scale(norm_O, settings.initial_O, given.offset_O, b_OR, factor, dtype)


def _gates_16_bits(given: Operands, dtype: torch.dtype) -> bool:
    """Whether a gate moves a B on the grid of 16 bits, to which rounding would take it back."""
    on_grid = given.b_OR is not None and given.b_OR.dtype == dtype
    return on_grid and given.outer_O is not None and dtype.itemsize < 4


def _outer_rows(b_OR: torch.Tensor, outer_O: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """diag(outer) B, in at least float32 and `dtype` where there is a vector."""
    return b_OR if outer_O is None else b_OR * outer_O.to(_wide_dtype(dtype))[:, None]


def mm_wide(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """A product in at least float32; where the device can it is never rounded to 16 bits."""
    if left.is_cuda and left.dtype.itemsize < 4 and not torch.compiler.is_compiling():
        return torch.mm(left, right, out_dtype=torch.float32)
    return _wide(left @ right)


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
    bf16_operands: bool = False,
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
        bf16_operands: for float32 tensors on a CPU that multiplies bfloat16 in units of its own: round W, and
            what it is multiplied with; products with A and B, the norm and all sums stay in float32.
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
        bf16_operands=bf16_operands,
    )
    result: torch.Tensor = _AdaptedProduct.apply(settings, x_NI, *operands)  # type: ignore[no-untyped-call]
    return result if bias_after_O is None else (result + bias_after_O).to(x_NI.dtype)
