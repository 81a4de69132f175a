"""PEFT's arms of the benchmarks."""

from __future__ import annotations

import pytest
import torch

from qdora.benchmark import layer, peers, step
from qdora.benchmark.gpu.models import peft_random_model, random_batch, random_model
from qdora.benchmark.gpu.sizes import TOY
from qdora.config import AdapterConfig, TrainingConfig

CPU = torch.device("cpu")


def watch(model: torch.nn.Module, seen: set[torch.dtype]) -> torch.nn.Module:
    """Note the dtype in which PEFT's A multiplies."""
    for name, module in model.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_peft_layers_compute_in_the_compute_dtype(monkeypatch, dtype):
    """Catches: PEFT's bf16 arms multiplying float32 adapters in float32, so that ours looks faster than it
    is; autocast over the float32 arms."""
    seen: set[torch.dtype] = set()
    build = layer.peft_layer
    monkeypatch.setattr(layer, "peft_layer", lambda *words, **rest: watch(build(*words, **rest), seen))
    config = AdapterConfig(r=4, alpha=8, dtype="float32")
    found = layer.benchmark_layer(layer.Shape(64, 128, 16), config, dtype, CPU, rounds=1)
    assert seen == {dtype}
    assert all(milliseconds > 0 for milliseconds in found["milliseconds"].values())


@pytest.mark.parametrize("dora", [False, True])
def test_peft_steps_compute_in_bf16_and_train_float32_adapters(dora):
    """Catches: as above, in a training step; adapters that autocast stores in bf16."""
    shared, seen = {}, set()
    random_model(TOY.config(1), CPU, dora=False, shared=shared)
    model = watch(peft_random_model(TOY.config(1), CPU, dora=dora, shared=shared), seen)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    batch = random_batch(TOY.config(1), 1, 16)
    take = step.peer_step(model, TrainingConfig(max_steps=1), batch, CPU, torch.bfloat16)
    assert take() > 0
    assert seen == {torch.bfloat16}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert [name for name, p in trained.items() if torch.equal(p, before[name])] == []
    assert any("magnitude" in name for name in trained) is dora


def test_dequantize_is_what_the_layer_multiplies_with():
    """Catches: a reference of another weight, or of another dtype, than bitsandbytes' layer."""
    torch.manual_seed(0)
    linear = peers.linear_4bit(torch.randn(64, 128) * 0.02, torch.float32)
    x_NI = torch.randn(5, 128)
    for dtype in (torch.float32, torch.bfloat16):
        assert peers.dequantize(linear, dtype).dtype == dtype
    torch.testing.assert_close(linear(x_NI), x_NI @ peers.dequantize(linear, torch.float32).T)
