"""Merged, unmerged, switched off."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from qdora.adapters.inject import adapted_layers, adapters_off, inject, merge_adapters, unmerge_adapters
from qdora.adapters.layer import AdaptedLinear
from qdora.models.load import load_base
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
