"""Trained models on disk, and the weights that they have, written out densely in float64."""

from __future__ import annotations

from pathlib import Path

import torch

from qdora.adapters.inject import adapted_layers
from qdora.adapters.layer import AdaptedLinear
from qdora.adapters.peft_io import save_adapter
from qdora.config import ModelConfig
from qdora.models.load import load_base
from tests.axes import METHODS, adapt
from tests.unit.adapters.oracle import ClosedForm, move_off_the_identity

Weights = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""W before and after training, float64, by the layer's name."""


def base_settings(model: Path, method: str, quantization: str | None = None) -> ModelConfig:
    """The base that a method trains on, or another format of it."""
    return ModelConfig(path=str(model), quantization=quantization or METHODS[method].quantization)


def train_a_little(
    model_folder: Path, folder: Path, method: str, *, seed: int = 0, quantization: str | None = None, **keys
) -> Weights:
    """Save a model of which everything that a method trains has moved; what a file of it must come to."""
    quantization = quantization or METHODS[method].quantization
    model, _ = load_base(model_folder, quantization=quantization, dtype="float32", device="cpu")
    before = dense_weights(model)
    settings = {} if METHODS[method].full else {"r": 4, "alpha": 11.0, "dtype": "float32"} | keys
    adapt(model, method, seed=seed, **settings)
    if METHODS[method].full:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("base.weight"):
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.add_(0.1 * parameter.std() * noise)
        after = dense_weights(model)
    else:
        starts = {name: _dense(layer) for name, layer in adapted_layers(model).items()}
        after = {}
        for i, (name, layer) in enumerate(adapted_layers(model).items()):
            move_off_the_identity(layer, seed=1000 * seed + i)
            after[name] = _dense(layer)
        before = {name: starts[name] for name in after}
    save_adapter(model, folder)
    return {name: (before[name], after[name]) for name in after}


def _dense(layer: AdaptedLinear) -> torch.Tensor:
    """s ∘ (W + c B A) in float64."""
    form = ClosedForm(layer)
    w_OI = form.w_OI if form.a is None else form.w_OI + form.update().detach()
    return w_OI if form.m is None else (form.m / w_OI.norm(dim=1)).detach()[:, None] * w_OI


def dense_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The base weights of the decoder's layers, float64."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, AdaptedLinear)}
    return {name: layer.base.dense().double() for name, layer in layers.items()}
