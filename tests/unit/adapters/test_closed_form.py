"""Outputs and gradients of the adapted layer against the float64 closed form, never at the identity."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qdora.adapters import math as algebra
from qdora.adapters.linear import AdaptedLinear
from qdora.config import AdapterConfig
from qdora.quant import weight as tiling

from .oracle import ClosedForm, move_off_the_identity, relative

METHODS = ("lora", "dora", "qlora", "qdora")


def make_layer(
    method: str, inputs: int = 24, outputs: int = 40, *, bias: bool = True, r: int = 4, dropout: float = 0.0
) -> AdaptedLinear:
    torch.manual_seed(3)
    linear = nn.Linear(inputs, outputs, bias=bias)
    config = AdapterConfig(method=method, r=r, alpha=11.0, dropout=dropout, dtype="float32")
    return move_off_the_identity(AdaptedLinear.from_linear(linear, config, seed=5))


def gradients(layer: AdaptedLinear, x: torch.Tensor, g: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(g)
    grads = {"y": y.detach(), "x": x.grad, "a": layer.direction.a_RI.grad, "b": layer.direction.b_OR.grad}
    if layer.magnitude is not None:
        grads["m"] = layer.magnitude.offset_O.grad
    return grads


def expected_gradients(
    layer: AdaptedLinear, x: torch.Tensor, g: torch.Tensor, mask: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    oracle = ClosedForm(layer)
    x = x.double().clone().requires_grad_()
    y = oracle(x, None if mask is None else mask.double())
    y.backward(g.double())
    grads = {"y": y.detach(), "x": x.grad, "a": oracle.a_RI.grad, "b": oracle.b_OR.grad}
    if oracle.m_O is not None:
        grads["m"] = oracle.m_O.grad
    return grads


def assert_close(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], bound: float) -> None:
    assert got.keys() == expected.keys()
    errors = {name: relative(got[name], expected[name]) for name in expected}
    assert max(errors.values()) <= bound, errors


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_float32_matches_the_closed_form(method, bias):
    """Catches: a dropped scale, alpha and r swapped, a scaled bias, a norm over columns, a norm that is
    differentiated."""
    layer = make_layer(method, bias=bias)
    x, g = torch.randn(3, 5, 24), torch.randn(3, 5, 40)
    assert_close(gradients(layer, x, g), expected_gradients(layer, x, g), 1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_float64_is_exact(method):
    """Catches: an approximation anywhere in the factored norm or the backward pass."""
    layer = make_layer(method)
    with torch.no_grad():
        for module in (layer.direction, layer.magnitude):
            if module is not None:
                module.double()
                for parameter in module.parameters():
                    parameter.grad_dtype = torch.float64
    if layer.magnitude is not None:
        # Norms in float64 too: the layer keeps float32 ones for its float32 weight.
        layer._w2_O = torch.cat([t.square().sum(1) for _, t in layer.weight_source.tiles(torch.float64)])
        layer._norm_versions = None
    x, g = torch.randn(2, 7, 24).double(), torch.randn(2, 7, 40).double()
    assert_close(gradients(layer, x, g), expected_gradients(layer, x, g), 1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_inputs(method):
    """Catches: sums over many terms held in bfloat16."""
    layer = make_layer(method, inputs=256, outputs=128, bias=False)
    x, g = torch.randn(64, 256).bfloat16(), torch.randn(64, 128).bfloat16()
    assert_close(gradients(layer, x, g), expected_gradients(layer, x, g), 2e-2)


@given(
    inputs=st.integers(2, 40).map(lambda n: 2 * n),
    outputs=st.integers(4, 70),
    r=st.integers(1, 4),
    batch=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    tile_bytes=st.integers(64, 4096),
    method=st.sampled_from(METHODS),
)
@settings(max_examples=60, deadline=None)
def test_any_shape_and_tile(inputs, outputs, r, batch, tile_bytes, method):
    """Catches: a tile off by one, a lost batch dimension, a rank that is taken for a side."""
    before = tiling.TILE_BYTES["cpu"]
    tiling.TILE_BYTES["cpu"] = tile_bytes
    try:
        layer = make_layer(method, inputs, outputs, r=r)
        x, g = torch.randn(*batch, inputs), torch.randn(*batch, outputs)
        got, expected = gradients(layer, x, g), expected_gradients(layer, x, g)
    finally:
        tiling.TILE_BYTES["cpu"] = before
    assert got["y"].shape == (*batch, outputs)
    for name in expected:
        assert torch.allclose(got[name].double(), expected[name], rtol=1e-4, atol=1e-4), name


@pytest.mark.parametrize("method", METHODS)
def test_dropout_acts_on_the_low_rank_branch_alone(method, monkeypatch):
    """Catches: dropout on the base product, a mask in backward that is not forward's, a missing 1/(1-p)."""
    masks = []
    original = algebra.keep_mask

    def recording(x, dropout, seed):
        mask = original(x, dropout, seed)
        masks.append(mask.clone())
        return mask

    monkeypatch.setattr(algebra, "keep_mask", recording)
    layer = make_layer(method, dropout=0.4).train()
    x, g = torch.randn(6, 24), torch.randn(6, 40)
    got = gradients(layer, x, g)
    assert len(masks) == 2
    assert torch.equal(masks[0], masks[1])
    assert masks[0].unique().tolist() == pytest.approx([0.0, 1 / 0.6])
    assert_close(got, expected_gradients(layer, x, g, masks[0]), 1e-5)
    layer.eval()
    layer(x)
    assert len(masks) == 2


def test_inputs_without_gradient_are_fine():
    """Catches: a backward that needs the gradient of the first layer's inputs."""
    layer = make_layer("qdora")
    layer(torch.randn(4, 24)).sum().backward()
    assert layer.direction.a_RI.grad is not None


def test_magnitude_without_a_direction():
    """Catches: a magnitude that only works next to a low-rank update."""
    torch.manual_seed(0)
    layer = AdaptedLinear.of_linear(nn.Linear(24, 40), "nf4")
    layer.add_adapter(AdapterConfig(method="qdora", dtype="float32"), direction=False)
    move_off_the_identity(layer)
    oracle = ClosedForm(layer)
    x = torch.randn(5, 24)
    layer(x).square().sum().backward()
    y = oracle(x.double())
    y.square().sum().backward()
    assert relative(layer(x), y) < 1e-5
    assert relative(layer.magnitude.offset_O.grad, oracle.m_O.grad) < 1e-5
