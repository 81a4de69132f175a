"""The adapted layer written out densely in float64: the formulas of the papers and nothing else."""

from __future__ import annotations

import torch
from torch import nn

from qdora.adapters.gated import GatedLoraUpdate
from qdora.adapters.layer import AdaptedLinear
from qdora.adapters.lora import LoraUpdate
from qdora.adapters.vera import VeraUpdate
from tests.axes import METHODS, adapter_config

PARAMETERS = {
    "a": "update.a_RI",
    "b": "update.b_OR",
    "gate": "update.gate_offset",
    "inner": "update.d_R",
    "outer": "update.b_O",
    "m": "magnitude.offset_O",
}
"""What the closed form calls a parameter, and where a layer keeps it."""


ADAPTED = tuple(name for name, spec in METHODS.items() if not spec.full)
COMBINATIONS = [(m, "detached") for m in ADAPTED] + [
    (m, "exact") for m in ADAPTED if METHODS[m].dora and METHODS[m].update
]


def make_layer(
    method: str, inputs: int = 24, outputs: int = 40, *, bias: bool = True, r: int = 4, **changes
) -> AdaptedLinear:
    torch.manual_seed(3)
    linear = nn.Linear(inputs, outputs, bias=bias)
    config = adapter_config(**({"method": method, "r": r, "alpha": 11.0, "dtype": "float32"} | changes))
    return move_off_the_identity(
        AdaptedLinear.from_linear(linear, config, quantization=METHODS[method].quantization, seed=5)
    )


def dense_weight(layer: AdaptedLinear, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """W as the layer sees it in a compute dtype, (O, I) float64."""
    return torch.cat([tile.double().clone() for _, tile in layer.base.tiles(dtype)])


class ClosedForm(nn.Module):
    """y = s ∘ (W x + c g diag(b) B diag(d) A (mask ∘ x)) + bias with autograd in float64.

    What is to be computed is said here, not taken from the layer: exact norm gradient, published dropout.
    """

    def __init__(self, layer: AdaptedLinear, *, exact: bool = False, published: bool = False) -> None:
        super().__init__()
        self.w_OI = dense_weight(layer)
        self.bias = None if layer.bias is None else layer.bias.detach().double()
        self.exact, self.published = exact, published
        self.scale = layer.update.scale if layer.update is not None else 0.0
        self.a = self.b = self.inner = self.outer = self.gate = self.m = None
        if isinstance(layer.update, LoraUpdate):
            self.a = nn.Parameter(layer.update.a_RI.detach().double())
            self.b = nn.Parameter(layer.update.b_OR.detach().double())
        elif isinstance(layer.update, VeraUpdate):
            update = layer.update.factors()
            self.a, self.b = update.a_RI.double(), update.b_OR.double()
            self.inner = nn.Parameter(update.inner_R.detach().double())
            self.outer = nn.Parameter(update.outer_O.detach().double())
        if isinstance(layer.update, GatedLoraUpdate):
            self.gate = nn.Parameter(1 + layer.update.gate_offset.detach().double())
        if layer.magnitude is not None:
            m_O = layer.magnitude.value().detach().double()
            self.m = m_O if layer.magnitude.offset_O is None else nn.Parameter(m_O)

    def update(self) -> torch.Tensor:
        a = self.a if self.inner is None else self.inner[:, None] * self.a
        b = self.b if self.outer is None else self.outer[:, None] * self.b
        return self.scale * (1 if self.gate is None else self.gate) * (b @ a)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        dropped = x if mask is None else x * mask
        inside = dropped if self.published and self.m is not None else x
        y = inside @ self.w_OI.T
        adapted_OI = self.w_OI
        if self.a is not None:
            y = y + dropped @ self.update().T
            adapted_OI = self.w_OI + self.update()
        if self.m is not None:
            norm_O = adapted_OI.norm(dim=1)
            y = y * (self.m / (norm_O if self.exact else norm_O.detach()))
            if inside is not x:  # y = W x + (s - 1) W drop(x) + s c B A drop(x)
                y = y + x @ self.w_OI.T - dropped @ self.w_OI.T
        return y if self.bias is None else y + self.bias


def move_off_the_identity(layer: AdaptedLinear, seed: int = 0) -> AdaptedLinear:
    """B ≠ 0 and m ≠ norm: at the identity most mistakes are invisible."""
    generator = torch.Generator().manual_seed(seed)

    def noise(like: torch.Tensor, size: float) -> torch.Tensor:
        return (torch.randn(like.shape, generator=generator) * size).to(like.dtype)

    with torch.no_grad():
        if isinstance(layer.update, LoraUpdate):
            layer.update.b_OR.copy_(noise(layer.update.b_OR, 0.1))
        elif isinstance(layer.update, VeraUpdate):
            layer.update.b_O.copy_(noise(layer.update.b_O, 0.5))
            layer.update.d_R.add_(noise(layer.update.d_R, 0.1))
        if isinstance(layer.update, GatedLoraUpdate):
            layer.update.gate_offset.fill_(-0.4 - 0.1 * seed)
        if layer.magnitude is not None and layer.magnitude.offset_O is None:
            layer.magnitude.initial_O.add_(noise(layer.magnitude.initial_O, 0.2))
        elif layer.magnitude is not None:
            layer.magnitude.offset_O.copy_(noise(layer.magnitude.offset_O, 0.2))
    return layer


def gradients(layer: AdaptedLinear, x: torch.Tensor, g: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output and gradients of a layer, under the closed form's names."""
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(g)
    found = {"y": y.detach(), "x": x.grad}
    own = dict(layer.named_parameters())
    return found | {k: own[path].grad for k, path in PARAMETERS.items() if path in own}


def expected_gradients(
    layer: AdaptedLinear, x: torch.Tensor, g: torch.Tensor, mask: torch.Tensor | None = None, **options: bool
) -> dict[str, torch.Tensor]:
    """What they must be."""
    oracle = ClosedForm(layer, **options)
    x = x.double().clone().requires_grad_()
    y = oracle(x, None if mask is None else mask.double())
    y.backward(g.double())
    return {"y": y.detach(), "x": x.grad} | {k: p.grad for k, p in oracle.named_parameters()}


def assert_close(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], bound: float) -> None:
    """Relative error of each, as a norm, within the bound."""
    assert got.keys() == expected.keys()
    errors = {name: relative(got[name], expected[name]) for name in expected}
    if "gate" in errors:  # a single sum, <∂B, B> / gate, whose terms may cancel: its error is that of ∂B
        errors["gate"] *= float(expected["gate"].norm() / expected["b"].norm())
    assert max(errors.values()) <= bound, errors


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).norm() / expected.norm())
