"""PEFT models with DoRA, off the identity, and what they compute; for the tests of `accelerate`."""

from __future__ import annotations

import copy
import os
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import qdora
from qdora.adapters import kernels, peft_layers
from qdora.benchmark.peers import linear_4bit

from .oracle import relative

BASES = ("dense", "nf4")
SIXTEEN_BITS = ("narrow", "wide", "autocast")
"""Model and adapters in bfloat16; the model alone; float32 under autocast."""
assert peft.__version__ == os.environ.get("PEFT_VERSION", peft.__version__)


class Net(nn.Module):
    """Two layers with biases, of whole blocks: bitsandbytes' CPU kernel reads other shapes wrongly."""

    def __init__(self, base: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.is_loaded_in_4bit = base == "nf4"  # by which PEFT chooses its class
        self.first, self.last = self.linear(128, 64, base, dtype), self.linear(64, 192, base, dtype)

    @staticmethod
    def linear(inputs: int, outputs: int, base: str, dtype: torch.dtype) -> nn.Module:
        layer = nn.Linear(inputs, outputs).to(dtype)
        nn.init.normal_(layer.bias)
        if base == "dense":
            return layer
        quantized = linear_4bit(layer.weight.detach(), dtype)
        quantized.bias = layer.bias
        return quantized

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.first(x)))


def adapted(base: str = "dense", dtype: torch.dtype = torch.float32, **changes) -> PeftModel:
    """A PEFT model off the identity, in training mode; twice the same for the same arguments."""
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 10, "use_dora": True, "target_modules": ["first", "last"]} | changes
    narrow = settings.pop("narrow", False)
    model = get_peft_model(Net(base, dtype), LoraConfig(**settings))
    for name, parameter in model.named_parameters() if narrow else ():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    return off_the_identity(model).train()


@torch.no_grad()
def off_the_identity(model: PeftModel, adapter: str = "default") -> PeftModel:
    for name, parameter in model.named_parameters():
        if f"lora_B.{adapter}" in name:
            parameter.normal_(std=0.3)
        if f"lora_magnitude_vector.{adapter}" in name:
            parameter.mul_(torch.rand_like(parameter) + 0.5)
    return model


def inputs(dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    return torch.randn(3, 5, 128, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def outcome(model: nn.Module, x: torch.Tensor, run=None) -> dict[str, torch.Tensor]:
    """Output and all gradients, with the same dropped inputs at every call."""
    model.zero_grad()
    x.grad = None
    torch.manual_seed(7)
    y = (model if run is None else run)(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype))
    return {"y": y.detach(), "x": x.grad} | {
        name.replace("offset", "weight"): p.grad.clone()
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def accelerated(model: PeftModel, **options) -> PeftModel:
    """All its layers, and none by PEFT's own path."""
    report = qdora.accelerate(model, **options)
    assert len(report.accelerated) == 2, report
    assert not report.left
    return model


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], bound: float = 1e-5) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert relative(ours[name], tensor) < bound, name


def in_float64(model: PeftModel) -> PeftModel:
    """PEFT's own computation of the same numbers, the weights as the codes say them."""
    exact = copy.deepcopy(model)
    for name in ("first", "last"):
        layer = exact.base_model.model.get_submodule(name)
        weight = peft_layers.adopt_linear(layer.base_layer, name)
        dense = nn.Linear(layer.in_features, layer.out_features)
        dense.weight.data = layer.base_layer.weight.data if weight is None else weight.dense(torch.float32)
        dense.bias = layer.base_layer.bias
        layer.base_layer = dense.requires_grad_(False)
    wide = exact.double()
    for name in ("first", "last"):
        layer = wide.base_model.model.get_submodule(name)
        layer.__class__ = peft_layers.LoraLinear
        layer.fan_in_fan_out = False
    return wide


def distances(base: str, how: str, seed: int = 1) -> dict[str, tuple[float, float]]:
    """Relative distance from float64 of output and gradients, ours and PEFT's, in one of `SIXTEEN_BITS`."""
    stored = torch.float32 if how == "autocast" else torch.bfloat16
    model, x = adapted(base, stored, narrow=how == "narrow"), inputs(stored, seed)
    exact = outcome(in_float64(model), x.detach().double().requires_grad_())
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        theirs = outcome(model, x)
        ours = outcome(accelerated(model), x)
    errors = {}
    for name, value in exact.items():
        assert ours[name].dtype == theirs[name].dtype, name
        errors[name] = relative(ours[name], value), relative(theirs[name], value)
    return errors


def as_on_cuda() -> list[tuple[Any, str, Any]]:
    """What to set, module, name and value, for a CPU to round as a GPU does."""
    return [
        (kernels, "available", lambda device: True),
        (peft_layers, "computes_in_float32", lambda device: False),
    ]
