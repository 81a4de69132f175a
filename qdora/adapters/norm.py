"""The row norms of an adapted weight, ||W + c BA||, without ever holding W or BA (docs/math.md §3).

O out_features   I in_features   R rank
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
    # Both terms share the factor c B: rowsum((2 W Aᵀ + c B (A Aᵀ)) ∘ B) is one product and one sum.
    slope_OR = torch.addmm(wa_OR, b_OR, a_RI @ a_RI.T, beta=2, alpha=scale)
    norm2_O = torch.add(w2_O, torch.linalg.vecdot(slope_OR, b_OR), alpha=scale)
    return positive_root(norm2_O)


class _ExactNorm(torch.autograd.Function):
    """A norm that is known already, with its gradient; see `exact_norm`."""

    @staticmethod
    def forward(
        ctx: Any,
        a_RI: torch.Tensor,
        b_OR: torch.Tensor,
        norm_O: torch.Tensor,
        wa_OR: torch.Tensor,
        weight: FrozenWeight,
        scale: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(a_RI, b_OR, norm_O, wa_OR)
        ctx.weight, ctx.scale = weight, scale
        return norm_O.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_O: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        a_RI, b_OR, norm_O, wa_OR = ctx.saved_tensors
        scale = ctx.scale
        pull_O = grad_O / norm_O
        pull_OR = pull_O[:, None] * b_OR
        # (pull ∘ B)ᵀ W, tile by tile: the one place where the exact gradient sees W again.
        grad_a = scale * scale * (pull_OR.T @ b_OR) @ a_RI
        for rows, w_tile in ctx.weight.tiles(a_RI.dtype):
            grad_a.addmm_(pull_OR[rows].T, w_tile, alpha=scale)
        grad_b = pull_O[:, None] * (scale * wa_OR + scale * scale * (b_OR @ (a_RI @ a_RI.T)))
        return grad_a, grad_b, None, None, None, None


def exact_norm(
    a_RI: torch.Tensor,
    b_OR: torch.Tensor,
    norm_O: torch.Tensor,
    wa_OR: torch.Tensor,
    weight: FrozenWeight,
    scale: float,
) -> torch.Tensor:
    """The norm as a function of A and B, for the ablation that differentiates it.

    ∂n/∂B = (c W Aᵀ + c² B A Aᵀ) / n,   ∂n/∂A = Bᵀ (c W + c² B A) / n      (docs/math.md §3)

    Args:
        a_RI, b_OR: the factors in the norm's dtype, differentiable.
        norm_O: their norm, computed already.
        wa_OR: W Aᵀ in the norm's dtype.
        weight: W; backward dequantizes its tiles once more.
        scale: c.
    Returns: (O,) equal to norm_O.
    Source: DoRA, arXiv:2402.09353 §4.3 and Table 7.
    """
    result: torch.Tensor = _ExactNorm.apply(a_RI, b_OR, norm_O, wa_OR, weight, scale)  # type: ignore[no-untyped-call]
    return result


def positive_root(norm2_O: torch.Tensor) -> torch.Tensor:
    """sqrt(max(norm2, tiny)), in place: norms are divided by.

    Rounding may take a row whose update cancels W a hair below zero; an all-zero row, which
    padded vocabularies have, has magnitude 0 and so stays zero instead of 0/0.
    """
    return norm2_O.clamp_min_(torch.finfo(norm2_O.dtype).tiny).sqrt_()
