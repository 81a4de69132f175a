"""The adapted layer written out densely in float64: the formula of the paper and nothing else."""

from __future__ import annotations

import torch
from torch import nn

from qdora.adapters.linear import AdaptedLinear


def dense_weight(layer: AdaptedLinear) -> torch.Tensor:
    """W as the layer sees it, (O, I) float64."""
    return torch.cat([tile.double().clone() for _, tile in layer.weight_source.tiles(torch.float32)])


class ClosedForm(nn.Module):
    """y = s * (W x + c B A (mask * x)) + bias with autograd in float64 and a detached norm."""

    def __init__(self, layer: AdaptedLinear) -> None:
        super().__init__()
        self.w_OI = dense_weight(layer)
        self.bias = None if layer.bias is None else layer.bias.detach().double()
        self.scale = layer.direction.scale if layer.direction else 0.0
        self.a_RI = self.b_OR = self.m_O = None
        if layer.direction is not None:
            self.a_RI = nn.Parameter(layer.direction.a_RI.detach().double())
            self.b_OR = nn.Parameter(layer.direction.b_OR.detach().double())
        if layer.magnitude is not None:
            self.m_O = nn.Parameter(layer.magnitude.value().detach().double())

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        y = x @ self.w_OI.T
        adapted_OI = self.w_OI
        if self.a_RI is not None:
            branch = x if mask is None else x * mask
            y = y + self.scale * (branch @ self.a_RI.T @ self.b_OR.T)
            adapted_OI = self.w_OI + self.scale * (self.b_OR @ self.a_RI)
        if self.m_O is not None:
            norm_O = adapted_OI.norm(dim=1).detach()
            y = y * (self.m_O / norm_O)
        return y if self.bias is None else y + self.bias


def move_off_the_identity(layer: AdaptedLinear, seed: int = 0) -> AdaptedLinear:
    """B ≠ 0 and m ≠ norm: at the identity most mistakes are invisible."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        if layer.direction is not None:
            b = torch.randn(layer.direction.b_OR.shape, generator=generator) * 0.1
            layer.direction.b_OR.copy_(b)
        if layer.magnitude is not None:
            offset = torch.randn(layer.magnitude.offset_O.shape, generator=generator) * 0.2
            layer.magnitude.offset_O.copy_(offset)
    return layer


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).norm() / expected.norm())
