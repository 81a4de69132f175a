"""RMSNorm in few passes over its input, in place of the module that an architecture brings.

y = weight ∘ x / sqrt(mean(x²) + eps), computed in at least float32 and rounded once.

N tokens   I features
Source: arXiv:1910.07467.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable


class _RMSNorm(torch.autograd.Function):
    """The numbers of `rms_norm` in fewer passes, of which on a CPU each costs as much as a small product.

    Kept for backward: x and one number a token.
    """

    @staticmethod
    def forward(ctx: Any, x_NI: torch.Tensor, weight_I: torch.Tensor, eps: float) -> torch.Tensor:
        y_NI, inverse_N1 = _normalize(x_NI, weight_I, eps)
        ctx.save_for_backward(x_NI, weight_I, inverse_N1)
        return y_NI

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_NI: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_NI, weight_I, inverse_N1 = ctx.saved_tensors
        x_wide, g_wide, weight_wide = (t.to(inverse_N1.dtype) for t in (x_NI, g_NI, weight_I))
        product_NI = g_wide * x_wide
        grad_weight = (inverse_N1.T @ product_NI)[0] if ctx.needs_input_grad[1] else None
        grad_x = None
        if ctx.needs_input_grad[0]:
            # ∂y/∂x = weight r (1 - x xᵀ r² / I),   r = 1 / sqrt(mean(x²) + eps)
            along_N1 = product_NI.mul_(weight_wide).mean(1, keepdim=True).mul_(-(inverse_N1**3))
            grad_x = torch.mul(g_wide, weight_wide, out=product_NI).mul_(inverse_N1)
            grad_x = grad_x.addcmul_(x_wide, along_N1).to(x_NI.dtype)
        return grad_x, grad_weight, None


def _normalize(x_NI: torch.Tensor, weight_I: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, in the dtype of x, and 1 / sqrt(mean(x²) + eps), (N, 1) in at least float32."""
    wide = torch.promote_types(x_NI.dtype, torch.float32)
    x_wide = x_NI.to(wide)
    inverse_N1 = x_wide.square().mean(1, keepdim=True).add_(eps).rsqrt_()
    return (x_wide * inverse_N1).mul_(weight_I).to(x_NI.dtype), inverse_N1


class RMSNorm(nn.Module):
    """`torch.nn.functional.rms_norm`; where it is many operators, in training on a CPU, as above instead.

    Args:
        weight_I: (I,) taken over, under the name that it has in checkpoints: `weight`.
        eps: added to the mean square.
    """

    def __init__(self, weight_I: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight_I
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., I), dtype kept."""
        trains = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        if not trains or x.is_cuda or torch.compiler.is_compiling():
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        x_NI = x.reshape(-1, x.shape[-1])
        y_NI: torch.Tensor = _RMSNorm.apply(x_NI, self.weight, self.eps)  # type: ignore[no-untyped-call]
        return y_NI.view(x.shape)

    def extra_repr(self) -> str:
        """Size and eps, for printing."""
        return f"{self.weight.shape[0]}, eps={self.eps}"


def fuse_norms(model: nn.Module) -> None:
    """Replace every module that computes an RMSNorm, in place; its parameter stays the same.

    Whether a module does is found by applying it, not by its class: a Gemma's multiplies by 1 + weight and
    is left alone.
    """
    known: dict[tuple[type, int], float | None] = {}
    for name, module in list(model.named_modules()):
        parameters = dict(module.named_parameters())
        if name and list(parameters) == ["weight"] and parameters["weight"].dim() == 1:
            key = (type(module), len(parameters["weight"]))
            if key not in known:
                known[key] = _eps_of(module)
            eps = known[key]
            if eps is not None:
                model.set_submodule(name, RMSNorm(parameters["weight"], eps))


def _eps_of(module: nn.Module) -> float | None:
    """The eps of a module with one vector as its weight, if it computes an RMSNorm; else None."""
    stated = (getattr(module, name, None) for name in ("variance_epsilon", "eps"))
    eps = next((value for value in stated if isinstance(value, float) and value > 0), None)
    if eps is None or list(module.buffers()) or len(inspect.signature(module.forward).parameters) != 1:
        return None
    probe = copy.deepcopy(module)
    random = torch.Generator().manual_seed(0)
    weight_I = torch.rand(probe.get_parameter("weight").shape, generator=random) + 0.5
    probe.register_parameter("weight", nn.Parameter(weight_I, requires_grad=False))
    # At the second scale the mean square is about eps: a module with another one is found out.
    x_NI = torch.randn(2, len(weight_I), generator=random) * torch.tensor([[1.0], [eps**0.5]])
    wanted_NI, _ = _normalize(x_NI.double(), weight_I.double(), eps)
    got_NI = probe(x_NI)
    return eps if torch.allclose(got_NI.double(), wanted_NI, rtol=1e-4, atol=0) else None
