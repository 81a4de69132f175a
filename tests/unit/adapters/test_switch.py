"""Merged, unmerged, switched off."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from qdora.adapters.inject import adapted_layers, adapters_off, inject, merge_adapters, unmerge_adapters
from qdora.adapters.layer import AdaptedLinear
from qdora.models.load import load_base
from qdora.quant import Quantization, nf4
from tests.axes import METHODS, adapter_config

from .oracle import move_off_the_identity, relative

ADAPTED = [name for name, spec in METHODS.items() if not spec.full]
IDS = torch.arange(4, 28).view(2, 12)


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)]
)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("method", ADAPTED)
def test_merged_equals_unmerged(method, bias, dtype, bound):
    """Catches: a merge without the scale, with a scaled bias, or with the wrong norm."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 48, bias=bias).bfloat16().float()
    layer = AdaptedLinear.from_linear(linear, adapter_config(method=method, r=4, alpha=11.0))
    move_off_the_identity(layer).eval()
    x = torch.randn(3, 5, 64)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    adapted = layer(x)
    layer.merge(dtype)
    assert layer.is_merged
    assert relative(layer(x), adapted) < bound
    assert layer.state_dict().keys() == before.keys()
    layer.unmerge()
    assert torch.equal(layer(x), adapted)
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def adapted_model(folder, method="qdora"):
    model, _ = load_base(str(folder), quantization=METHODS[method].quantization, dtype="float32")
    inject(model, adapter_config(method=method, r=4))
    for seed, layer in enumerate(adapted_layers(model).values()):
        move_off_the_identity(layer, seed)
    return model


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("method", ["qdora", "dora", "qdvora"])
def test_a_model_merged_and_unmerged(tiny_model_folder, method):
    """Catches: a layer that is left out, and packed bytes that are not what they were."""
    model = adapted_model(tiny_model_folder, method)
    before = copy.deepcopy(model.state_dict())
    adapted = logits(model)
    merge_adapters(model)
    assert relative(logits(model), adapted) < 1e-5
    model.to(torch.device("cpu"))
    assert relative(logits(model), adapted) < 1e-5
    unmerge_adapters(model)
    assert torch.equal(logits(model), adapted)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_switched_off_is_the_base(tiny_model_folder):
    """Catches: a magnitude or a direction that stays on, and an adapter that does not come back."""
    model = adapted_model(tiny_model_folder)
    base, _ = load_base(str(tiny_model_folder), dtype="float32")
    adapted = logits(model)
    with adapters_off(model):
        assert torch.equal(logits(model), logits(base))
        merge_adapters(model)
        assert torch.equal(logits(model), logits(base))
    unmerge_adapters(model)
    assert torch.equal(logits(model), adapted)
    with pytest.raises(ValueError, match="on purpose"), adapters_off(model):
        raise ValueError("on purpose")
    assert torch.equal(logits(model), adapted)


def test_training_a_merged_model_is_an_error(tiny_model_folder):
    """Catches: a training run in which the adapter silently stays as it is."""
    model = adapted_model(tiny_model_folder).train()
    merge_adapters(model)
    with pytest.raises(RuntimeError, match="unmerge before training"):
        model(input_ids=IDS)


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)]
)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(("quantization", "method"), [("nf4", "qdora"), ("fp4", "qlora"), ("nf4", "qdvora")])
def test_folded_equals_adapted(quantization, method, double, bias, dtype, bound, monkeypatch):
    """Catches: scales or their order that bitsandbytes' `gemm_4bit` reads otherwise, s on the wrong side of
    the update, a bias that is scaled, a second rounding, a fold that training sees, or an adapter that is
    switched off."""
    torch.manual_seed(0)
    monkeypatch.setattr(nf4, "has_gemm", lambda device: True)  # its reference computes on a CPU
    linear = nn.Linear(128, 48, bias=bias)
    base = Quantization(quantization, 64, double).from_dense(linear.weight.detach())
    layer = AdaptedLinear(base, linear.bias)
    layer.add_adapter(adapter_config(method=method, r=4, alpha=11.0, dtype="float32"))
    move_off_the_identity(layer).eval()
    x = torch.randn(3, 5, 128).to(dtype)
    adapted = layer(x)
    exact = layer.merged(torch.float32)
    layer.fold()
    with torch.no_grad():
        folded = layer(x)
    assert folded.dtype == dtype
    wanted = x.float() @ exact.T + (0 if linear.bias is None else linear.bias)
    assert relative(folded.float(), wanted) < bound
    assert torch.equal(layer(x), adapted)  # gradients are wanted there
    layer.enabled = False
    with torch.no_grad():
        switched_off = layer(x)
        layer.unfold()
        assert torch.equal(layer(x), switched_off)
        layer.enabled = True
        assert torch.equal(layer(x), adapted)


def test_what_no_kernel_reads_is_not_folded(monkeypatch):
    """Catches: wrong scales where a row is no whole number of blocks; a fold of 8-bit or dense weights, of
    an adapter that is switched off, or on a CPU, where tiles are faster."""
    cases = [("nf4", 96, True), ("int8", 128, True), ("none", 128, True), ("nf4", 128, False)]
    for quantization, width, enabled in cases:
        monkeypatch.setattr(nf4, "has_gemm", lambda device: True)
        layer = AdaptedLinear.from_linear(
            nn.Linear(width, 48), adapter_config(r=4), quantization=quantization
        )
        layer.enabled = enabled
        layer.fold()
        assert layer._folded is None
        monkeypatch.undo()
    layer = AdaptedLinear.from_linear(nn.Linear(128, 48), adapter_config(r=4))
    layer.fold()
    assert layer._folded is None
