"""Outputs and gradients of the adapted layer against the float64 closed form, never at the identity."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from qdora.adapters import product
from qdora.adapters.dropout import keep_mask
from qdora.adapters.kernels import native
from qdora.adapters.layer import AdaptedLinear
from qdora.quant import base as tiling
from qdora.quant.dense import DenseWeight
from tests.axes import METHODS, adapter_config

from .oracle import (
    ADAPTED,
    COMBINATIONS,
    ClosedForm,
    assert_close,
    expected_gradients,
    gradients,
    make_layer,
    move_off_the_identity,
    relative,
)


def test_every_combination_of_the_axes_is_tested():
    """Catches: a point of the test table that is missing or doubled."""
    axes = [(s.quantization, s.update, s.dora) for s in METHODS.values() if not s.full]
    updates = (None, "lora", "gated_lora", "vera")
    expected = {(b, d, m) for b in ("none", "nf4") for d in updates for m in (False, True)}
    assert len(axes) == len(set(axes))
    assert set(axes) == expected - {("none", None, False), ("nf4", None, False)}


@pytest.fixture(params=["functions", "torch"])
def on_a_cpu(request, monkeypatch):
    """What computes beside the products: the compiled functions, or torch, as without a compiler."""
    if request.param == "torch":
        monkeypatch.setattr(native, "_library", lambda: None)


@pytest.mark.usefixtures("on_a_cpu")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("method", "norm"), COMBINATIONS)
def test_float32_matches_the_closed_form(method, norm, bias):
    """Catches: a dropped scale, alpha and r swapped, a scaled bias, a norm over columns, a norm that is
    differentiated where it is a constant, or the other way round."""
    layer = make_layer(method, bias=bias, norm_gradient=norm)
    x, g = torch.randn(3, 5, 24), torch.randn(3, 5, 40)
    assert_close(gradients(layer, x, g), expected_gradients(layer, x, g, exact=norm == "exact"), 1e-5)


@pytest.fixture
def float64_norms(monkeypatch):
    """Norms in float64 too: a layer keeps float32 ones for a float32 weight."""
    for method in ("dora", "qdora"):
        weight = type(make_layer(method).base)
        monkeypatch.setattr(weight, "norm_dtype", property(lambda self: torch.float64))


def in_float64(layer):
    """The layer with its adapter, and the gradients of it, in float64."""
    for module in (layer.update, layer.magnitude):
        if module is not None:
            module.double()
            for parameter in module.parameters():
                parameter.grad_dtype = torch.float64
    return layer


@pytest.mark.parametrize(("method", "norm"), COMBINATIONS)
def test_float64_is_exact(method, norm, float64_norms):
    """Catches: an approximation anywhere in the factored norm or the backward pass."""
    layer = in_float64(make_layer(method, norm_gradient=norm))
    x, g = torch.randn(2, 7, 24).double(), torch.randn(2, 7, 40).double()
    assert_close(gradients(layer, x, g), expected_gradients(layer, x, g, exact=norm == "exact"), 1e-10)


@pytest.mark.usefixtures("on_a_cpu")
@pytest.mark.parametrize(("method", "norm"), COMBINATIONS)
def test_bfloat16_inputs(method, norm):
    """Catches: sums over many terms held in bfloat16."""
    layer = make_layer(method, inputs=256, outputs=128, bias=False, norm_gradient=norm)
    x, g = torch.randn(64, 256).bfloat16(), torch.randn(64, 128).bfloat16()
    assert_close(gradients(layer, x, g), expected_gradients(layer, x, g, exact=norm == "exact"), 2e-2)


@given(
    inputs=st.integers(2, 40).map(lambda n: 2 * n),
    outputs=st.integers(4, 70),
    r=st.integers(1, 4),
    alpha=st.floats(0.1, 50),
    rslora=st.booleans(),
    batch=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    tile_bytes=st.integers(64, 4096),
    combination=st.sampled_from(COMBINATIONS),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_shape_and_tile(float64_norms, inputs, outputs, r, alpha, rslora, batch, tile_bytes, combination):
    """Catches: a tile off by one, a lost batch dimension, a rank that is taken for a side.

    In float64: a few float32 terms that nearly cancel, as those of A x may for one token and rank 1, have
    a relative error without a bound.
    """
    method, norm = combination
    before = tiling.TILE_BYTES["cpu"]
    tiling.TILE_BYTES["cpu"] = tile_bytes
    try:
        layer = make_layer(method, inputs, outputs, r=r, alpha=alpha, rslora=rslora, norm_gradient=norm)
        layer = in_float64(layer)
        x, g = torch.randn(*batch, inputs).double(), torch.randn(*batch, outputs).double()
        got = gradients(layer, x, g)
        expected = expected_gradients(layer, x, g, exact=norm == "exact")
    finally:
        tiling.TILE_BYTES["cpu"] = before
    assert got["y"].shape == (*batch, outputs)
    for name in expected:
        size = float(expected[name].abs().max()) + 1e-3
        bound = 1e-6 if name == "x" else 1e-10  # the kernels take s with the block scales, in float32
        assert torch.allclose(got[name], expected[name], rtol=bound, atol=bound * size), name


@pytest.mark.parametrize("method", [m for m in ADAPTED if METHODS[m].update])
def test_dropout_acts_on_the_low_rank_branch_alone(method, monkeypatch):
    """Catches: dropout on the base product, a mask in backward that is not forward's, a missing 1/(1-p)."""
    masks = []
    original = product.keep_mask

    def recording(*arguments):
        masks.append(original(*arguments).clone())
        return masks[-1].clone()

    monkeypatch.setattr(product, "keep_mask", recording)
    layer = make_layer(method, dropout=0.4).train()
    x, g = torch.randn(6, 24), torch.randn(6, 40)
    got = gradients(layer, x, g)
    assert len(masks) == 2
    assert torch.equal(masks[0], masks[1])
    assert masks[0].unique().tolist() == pytest.approx([0.0, 1 / 0.6], rel=2e-5)  # p in 16 bits
    assert_close(got, expected_gradients(layer, x, g, masks[0]), 1e-5)
    layer.eval()
    layer(x)
    assert len(masks) == 2


@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 0.999])
def test_masks_keep_the_share_that_they_say(p):
    """Catches: random bits that are not uniform, a mean that is not 1, neighbours that go together."""
    mask = keep_mask(torch.empty(1000), 333, p, seed=torch.tensor(7))
    kept = (mask > 0).float()
    assert mask.shape == (1000, 333)
    assert float(kept.mean()) == pytest.approx(1 - p, abs=4 * (p * (1 - p) / mask.numel()) ** 0.5 + 1e-5)
    assert float(mask.mean()) == pytest.approx(1, abs=0.1 if p > 0.9 else 0.01)
    flat = kept.flatten() - kept.mean()
    for lag in (1, 2, 3, 4, 333) if 0 < p < 0.9 else ():
        correlation = float((flat[lag:] * flat[:-lag]).mean() / flat.square().mean())
        assert abs(correlation) < 0.01, lag
    assert torch.equal(mask, keep_mask(torch.empty(1000), 333, p, seed=torch.tensor(7)))
    assert p == 0 or not torch.equal(mask, keep_mask(torch.empty(1000), 333, p, seed=torch.tensor(8)))


@pytest.mark.parametrize("method", [m for m in ADAPTED if METHODS[m].update])
def test_published_dropout_is_the_published_formula(method, monkeypatch):
    """Catches: a placement that is not NVlabs': W x + (s - 1) W drop(x) + s c B A drop(x)."""
    mask = (torch.rand(6, 24) > 0.4) / 0.6
    monkeypatch.setattr(F, "dropout", lambda x, p: x * mask)
    monkeypatch.setattr(product, "keep_mask", lambda like, inputs, dropout, seed: mask.clone())
    layer = make_layer(method, dropout=0.4, dropout_placement="published").train()
    x, g = torch.randn(6, 24), torch.randn(6, 40)
    assert_close(gradients(layer, x, g), expected_gradients(layer, x, g, mask, published=True), 1e-5)


def test_inputs_without_gradient_are_fine():
    """Catches: a backward that needs the gradient of the first layer's inputs."""
    for method in ADAPTED:
        layer = make_layer(method)
        layer(torch.randn(4, 24)).sum().backward()
        assert all(p.grad is not None for p in layer.parameters() if p.requires_grad)


def test_a_magnitude_of_zero_stops_nothing():
    """Catches: 0/0 in the gradient of a magnitude that has reached zero."""
    layer = make_layer("qdora")
    with torch.no_grad():
        layer.magnitude.offset_O[3] = -layer.magnitude.initial_O[3]
    got = gradients(layer, torch.randn(5, 24), torch.randn(5, 40))
    assert all(torch.isfinite(value).all() for value in got.values())


def test_an_all_zero_row_learns():
    """Catches: a row of zeros, as pruned weights have, whose magnitude stays frozen at zero."""
    linear = nn.Linear(24, 8, bias=False)
    with torch.no_grad():
        linear.weight[3] = 0
    layer = AdaptedLinear.from_linear(linear, adapter_config(method="qdora", r=4, dtype="float32"))
    x, g = torch.randn(5, 24), torch.randn(5, 8)
    assert (layer(x)[:, 3] == 0).all()
    with torch.no_grad():
        layer.update.b_OR.normal_()
    oracle = ClosedForm(layer)
    y = oracle(x.double())
    y.backward(g.double())
    got = gradients(layer, x, g)
    assert relative(got["y"], y) < 1e-5
    assert relative(got["m"], oracle.m.grad) < 1e-5
    assert float(got["m"][3].abs()) > 1e-3


@pytest.mark.parametrize("bias", [True, False])
def test_a_trained_base_gets_its_gradient(bias):
    """Catches: full fine-tuning that leaves W or its bias as they are."""
    torch.manual_seed(0)
    plain = nn.Linear(24, 40, bias=bias)
    layer = AdaptedLinear(DenseWeight(plain.weight.detach()), plain.bias)
    layer.base.weight = nn.Parameter(plain.weight.detach().clone())
    for parameter in layer.parameters():
        parameter.requires_grad_(True)
    x, g = torch.randn(2, 3, 24, requires_grad=True), torch.randn(2, 3, 40)
    layer(x).backward(g)
    got_x, x.grad = x.grad, None
    plain(x).backward(g)
    assert relative(got_x, x.grad) < 1e-6
    assert relative(layer.base.weight.grad, plain.weight.grad) < 1e-6
    assert not bias or relative(layer.bias.grad, plain.bias.grad) < 1e-6


@pytest.mark.parametrize("method", ["lora", "dora", "vera", "dvora", "magnitude"])
def test_a_float64_base_is_computed_in_float64(method):
    """Catches: a product of float32 parameters that is rounded before it meets the wider input."""
    torch.manual_seed(0)
    linear = nn.Linear(24, 40).double()
    config = adapter_config(method, r=5, alpha=12.0, dtype="float32")
    layer = move_off_the_identity(AdaptedLinear.from_linear(linear, config, quantization="none"))
    x, g = torch.randn(7, 24, dtype=torch.float64), torch.randn(7, 40, dtype=torch.float64)
    got, expected = gradients(layer, x, g), expected_gradients(layer, x, g)
    for name in ("x", "y"):
        assert relative(got[name], expected[name]) < 1e-13
