"""The low-rank update of a weight, whatever trains it: c diag(b) B diag(d) A."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch


class Update(NamedTuple):
    """The factors of c diag(outer) B diag(inner) A, differentiable in those that are trained.

    Attributes:
        a_RI, b_OR: the factors.
        inner_R, outer_O: VeRA's vectors d and b; None, meaning ones, for LoRA.
        scale: c.
    """

    a_RI: torch.Tensor
    b_OR: torch.Tensor
    inner_R: torch.Tensor | None
    outer_O: torch.Tensor | None
    scale: float

    def factors(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """diag(inner) A (R, I) and diag(outer) B (O, R) in `dtype`; their gradients come back unrounded."""
        a_RI, b_OR = widened(self.a_RI, dtype), widened(self.b_OR, dtype)
        if self.inner_R is not None:
            a_RI = a_RI * widened(self.inner_R, dtype)[:, None]
        if self.outer_O is not None:
            b_OR = b_OR * widened(self.outer_O, dtype)[:, None]
        return a_RI, b_OR

    def stored(self) -> Sequence[torch.Tensor]:
        """The tensors that it consists of."""
        return [t for t in (self.a_RI, self.b_OR, self.inner_R, self.outer_O) if t is not None]


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
    if stored.dtype == dtype:
        return stored
    result: torch.Tensor = _Widened.apply(stored, dtype)  # type: ignore[no-untyped-call]
    return result
