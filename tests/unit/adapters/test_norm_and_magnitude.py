"""When the norm is computed, what it is, and that a bf16 magnitude learns."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qdora.adapters import magnitude as algebra
from qdora.adapters.kernels import native
from qdora.adapters.layer import AdaptedLinear
from qdora.config import TrainingConfig
from qdora.training.optimizer import AdapterOptimizer
from tests.axes import METHODS, adapter_config
from tools import small_rate_tail

from .oracle import ClosedForm, dense_weight, move_off_the_identity, relative


def make_layer(
    method: str = "qdora", dtype: str = "bfloat16", inputs: int = 64, outputs: int = 48
) -> AdaptedLinear:
    torch.manual_seed(0)
    config = adapter_config(method=method, r=8, alpha=16.0, dtype=dtype)
    return AdaptedLinear.from_linear(
        nn.Linear(inputs, outputs), config, quantization=METHODS[method].quantization, seed=1
    )


@pytest.mark.parametrize("method", ["dora", "qdora"])
def test_step_zero_reproduces_the_base_exactly(method):
    """Catches: magnitudes started from the unquantized weight's norm, as published scripts do."""
    layer = make_layer(method)
    plain = AdaptedLinear(layer.base, layer.bias)
    x = torch.randn(7, 64)
    assert torch.equal(layer(x), plain(x))


def test_norm_is_that_of_the_dense_sum():
    """Catches: a missing cross term, a norm over columns, a scale that is not squared."""
    layer = move_off_the_identity(make_layer())
    d = layer.update
    dense = dense_weight(layer) + d.scale * (d.b_OR.double() @ d.a_RI.double())
    assert relative(layer.weight_norm(), dense.norm(dim=1)) < 1e-6


def count_norms(monkeypatch) -> list[int]:
    calls: list[int] = []
    original = algebra.factored_norm

    def counting(*arguments):
        calls.append(1)
        return original(*arguments)

    monkeypatch.setattr(algebra, "factored_norm", counting)
    return calls


def test_norm_is_computed_once_per_optimizer_step(monkeypatch):
    """Catches: norm work in seven of eight accumulated forwards, and a stale norm after a step."""
    layer = make_layer()
    parameters = {n: p for n, p in layer.named_parameters() if p.requires_grad}
    optimizer = AdapterOptimizer(parameters, TrainingConfig(max_steps=1, learning_rate=1e-2))
    calls = count_norms(monkeypatch)
    for _ in range(3):
        optimizer.zero_grad()
        for _ in range(8):
            layer(torch.randn(4, 64)).square().sum().backward()
        optimizer.step(1e-2)
    assert len(calls) == 3
    x = torch.randn(5, 64)
    assert relative(layer(x), ClosedForm(layer)(x.double())) < 1e-5


def test_norm_follows_loading_and_replaced_storage():
    """Catches: a norm kept after A or B were written by hand, loaded, or given new storage."""
    layer = move_off_the_identity(make_layer())
    x = torch.randn(5, 64)
    layer(x)
    state = {k: v + 0.3 if "b_OR" in k else v for k, v in layer.state_dict().items()}
    layer.load_state_dict(state)
    assert relative(layer(x), ClosedForm(layer)(x.double())) < 1e-5
    layer.update.b_OR.data = layer.update.b_OR.data * 2
    assert relative(layer(x), ClosedForm(layer)(x.double())) < 1e-5


def test_forward_computes_the_norm_without_a_second_dequantization(monkeypatch):
    """Catches: the weight dequantized twice in a forward with a stale norm, as PEFT does."""
    layer = move_off_the_identity(make_layer())
    passes: list[int] = []
    monkeypatch.setattr(
        native, "_library", lambda: None
    )  # as without a compiler; it reads the codes as often
    original = type(layer.base).tiles

    def counting(self, *arguments):
        passes.append(1)
        return original(self, *arguments)

    monkeypatch.setattr(type(layer.base), "tiles", counting)
    x = torch.randn(5, 64, requires_grad=True)
    y = layer(x)
    assert len(passes) == 1
    y.sum().backward()
    assert len(passes) == 2


def test_an_all_zero_row_stays_zero():
    """Catches: 0/0 in a padded row of a vocabulary."""
    linear = nn.Linear(64, 8, bias=False)
    with torch.no_grad():
        linear.weight[3] = 0
    layer = AdaptedLinear.from_linear(linear, adapter_config(method="qdora", r=4))
    y = layer(torch.randn(5, 64))
    assert torch.isfinite(y).all()
    assert (y[:, 3] == 0).all()


def train_stack(dtype: str, naive: bool = False, steps: int = 30) -> tuple[float, float]:
    """Relative movement of the magnitudes of a stack of layers, and the final loss."""
    torch.manual_seed(0)
    layers = [make_layer("qdora", dtype, 64, 64) for _ in range(3)]
    model = nn.Sequential(*layers)
    x, target = torch.randn(256, 64), torch.randn(256, 64)
    start = torch.cat([layer.magnitude.value().detach().clone() for layer in layers])
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = AdapterOptimizer(parameters, TrainingConfig(max_steps=steps, learning_rate=2e-4))
    stored = [layer.magnitude.value().detach().bfloat16() for layer in layers]
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), target)
        loss.backward()
        optimizer.step(2e-4)
        if naive:
            # What happens elsewhere: m itself is the bf16 parameter, so each step is rounded to its grid.
            for layer, m_O in zip(layers, stored, strict=True):
                moved = layer.magnitude.value().detach() - layer.magnitude.initial_O
                m_O.add_(moved.bfloat16())
                layer.magnitude.load(m_O.float())
                for master in optimizer.masters.values():
                    if master.shape == layer.magnitude.offset_O.shape:
                        master.data.zero_()
    end = torch.cat([layer.magnitude.value().detach() for layer in layers])
    if naive:
        start = torch.cat([m.float() for m in [s.bfloat16() for s in start.split(64)]])
    return relative(end, start) if not torch.equal(end, start) else 0.0, float(loss.detach())


def test_bf16_magnitude_moves_as_float32_does():
    """Catches: a bf16 magnitude that silently stays frozen; the naive storage is the counter-example."""
    full, full_loss = train_stack("float32")
    half, half_loss = train_stack("bfloat16")
    frozen, _ = train_stack("bfloat16", naive=True)
    assert full > 1e-4
    assert abs(half - full) <= 0.05 * full
    assert abs(half_loss - full_loss) <= 1e-3 * full_loss
    assert frozen < 0.2 * full


def test_micro_batch_gradients_are_summed_in_float32():
    """Catches: gradients of bf16 parameters accumulated in bf16, which loses the small ones."""
    layer = move_off_the_identity(make_layer())
    x = torch.randn(64, 64)
    layer(x).square().sum().backward()
    whole = {n: p.grad.clone() for n, p in layer.named_parameters() if p.requires_grad}
    layer.zero_grad()
    for part in x.split(8):
        layer(part).square().sum().backward()
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.dtype == torch.float32
            assert relative(parameter.grad, whole[name]) < 1e-6, name


def test_the_tail_of_a_decayed_rate_moves_as_float32_does():
    """Catches: bf16 factors that stand still once the rate has decayed to 1%; the naive step is the
    counter-example."""
    start = small_rate_tail.common_start()
    reference, fall = small_rate_tail.tail("float32", start)
    own, own_fall = small_rate_tail.tail("bf16, float32 masters (qdora)", start)
    naive, naive_fall = small_rate_tail.tail("bf16, naive", start)
    for leaf in ("a_RI", "b_OR", "offset_O"):
        assert abs(small_rate_tail.projection(own, reference, leaf) - 1) <= 0.05, leaf
        assert small_rate_tail.projection(naive, reference, leaf) < 0.2, leaf
    assert own_fall == pytest.approx(fall, rel=0.05)
    assert naive_fall < 0.2 * fall
