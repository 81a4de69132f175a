"""Put adapters into a model: choose layers by name pattern, replace them, freeze the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import TypeAlias

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from qdora.adapters.direction import LowRank, SharedPair, Vera, layer_seed
from qdora.adapters.fingerprint import combine, tensor_digest
from qdora.adapters.linear import AdaptedLinear, refuse_large_rank
from qdora.adapters.methods import METHODS
from qdora.adapters.patterns import layer_config, match_layers, matches
from qdora.adapters.whole import whole
from qdora.config import AdapterConfig
from qdora.errors import InputError
from qdora.quant.dense import DenseWeight
from qdora.quant.nf4 import NF4Weight

Linear: TypeAlias = nn.Linear | AdaptedLinear

FULL_METHOD = "_qdora_full_method"
"""Attribute of a model that is fully trained: by which method."""
FULL_STORAGE = "_qdora_full_storage"
"""Attribute of such a model: dtype of its parameters where they are whole; their shards are float32."""


@dataclass(frozen=True)
class InjectionReport:
    """What `inject` did.

    Attributes:
        direction_layers, magnitude_layers: full names of the layers that got each.
        trainable: parameters that are trained.
        total: parameters of the model, a 4-bit weight counted as one parameter each.
    """

    direction_layers: tuple[str, ...]
    magnitude_layers: tuple[str, ...]
    trainable: int
    total: int

    @property
    def percentage(self) -> float:
        """Trainable parameters in percent of all."""
        return 100 * self.trainable / self.total

    def __str__(self) -> str:
        return (
            f"{len(self.direction_layers)} layers with a direction, {len(self.magnitude_layers)} with a "
            f"magnitude; {self.trainable:,} of {self.total:,} parameters trained ({self.percentage:.2f}%)"
        )


def inject(model: nn.Module, config: AdapterConfig, *, seed: int = 0) -> InjectionReport:
    """Adapt the layers that the configuration names, in place, and freeze everything else.

    Full fine-tuning adapts nothing and freezes nothing: every parameter is trained.

    Args:
        model: its linear layers are `nn.Linear` or, from `load_base`, `AdaptedLinear`.
        config: what to add and where.
        seed: of A, where each layer draws its own from it and its name, and of VeRA's pair.
    Returns: the report; the model's output has not changed yet.
    Raises: InputError: a pattern matches no layer, r is larger than a layer's side, the method
        does not fit the base, a layer has an adapter already, or its weight is shared.
    """
    spec = METHODS[config.method]
    layers = linear_layers(model)
    if spec.trains_base:
        _refuse_other_base(layers, config)
        train_everything(model)
        object.__setattr__(model, FULL_METHOD, config.method)
        return InjectionReport((), (), count_parameters(model), count_parameters(model))
    directions, magnitudes = _choose(model, layers, config)
    chosen = {name: layers[name] for name in layers if name in {*directions, *magnitudes}}
    _refuse_other_base(chosen, config)
    _refuse_unfit(model, chosen, directions, config)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    pair = (
        _shared_pair([layers[name] for name in directions], config.r, seed)
        if spec.direction == "vera"
        else None
    )
    for name in chosen:
        layer = _adaptable(layers[name], config)
        layer.add_adapter(
            layer_config(config, name),
            direction=name in directions,
            magnitude=name in magnitudes,
            seed=layer_seed(seed, name),
            pair=pair,
        )
        if layer is not layers[name]:
            model.set_submodule(name, layer)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return InjectionReport(tuple(directions), tuple(magnitudes), trainable, count_parameters(model))


def linear_layers(model: nn.Module) -> dict[str, Linear]:
    """The layers that can carry an adapter, by full name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, AdaptedLinear))}


def compute_dtype(model: nn.Module) -> torch.dtype:
    """What an unquantized model computes in: its widest dtype, since its vectors are never narrower."""
    return reduce(torch.promote_types, (parameter.dtype for parameter in model.parameters()))


def train_everything(model: nn.Module) -> None:
    """Make every parameter trainable, in the dtype that the model computes in.

    Where 16-bit matrices are widened for each product anyway, a float32 parameter that is its own
    master takes less memory than a 16-bit one beside its master.
    """
    compute = compute_dtype(model)
    object.__setattr__(model, FULL_STORAGE, compute)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(compute)
        parameter.requires_grad_(True)
        parameter.grad_dtype = torch.promote_types(compute, torch.float32)


def count_parameters(model: nn.Module) -> int:
    """Parameters of the model as its architecture counts them: packed 4-bit weights one by one."""
    quantized = [m for m in model.modules() if isinstance(m, NF4Weight)]
    packed = sum(m.packed.numel() - m.absmax.numel() for m in quantized)
    return packed + sum(p.numel() for p in model.parameters())


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """The layers that have an adapter, by full name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, AdaptedLinear) and module.has_adapter
    }


def initial_a_fingerprint(model: nn.Module) -> str:
    """Digest of all A: right after `inject`, arms of a comparison must agree on it.

    Where A is sharded, every process must ask at the same time.
    """
    return combine(
        {
            name: tensor_digest(name, _stored_a(layer.direction))
            for name, layer in adapted_layers(model).items()
            if layer.direction is not None
        }
    )


def _stored_a(direction: LowRank | Vera) -> torch.Tensor:
    return whole(direction.a_RI, direction.storage) if isinstance(direction, LowRank) else direction.pair.a_RI


def _choose(
    model: nn.Module, layers: dict[str, Linear], config: AdapterConfig
) -> tuple[list[str], list[str]]:
    """Names of the layers that get a direction, and of those that get a magnitude."""
    spec = METHODS[config.method]
    _refuse_conv1d(model, layers, config)
    directions = match_layers(layers, config.targets, "adapter.targets") if spec.direction else []
    magnitude_patterns = config.magnitude_targets or config.targets
    magnitudes = (
        match_layers(layers, magnitude_patterns, "adapter.magnitude_targets") if spec.magnitude else []
    )
    if spec.direction:
        match_layers(directions, config.rank_pattern, "adapter.rank_pattern")
        match_layers(directions, config.alpha_pattern, "adapter.alpha_pattern")
    return directions, magnitudes


def _shared_pair(layers: list[Linear], r: int, seed: int) -> SharedPair:
    largest = max(layer.in_features for layer in layers), max(layer.out_features for layer in layers)
    return SharedPair(r, *largest, seed=seed, device=_weight(layers[0]).device)


def _refuse_conv1d(model: nn.Module, layers: dict[str, Linear], config: AdapterConfig) -> None:
    transposed = [name for name, module in model.named_modules() if isinstance(module, Conv1D)]
    for pattern in (*config.targets, *(config.magnitude_targets or ())):
        hits = [name for name in transposed if matches(name, pattern)]
        if hits and not any(matches(name, pattern) for name in layers):
            raise InputError(
                f"{hits[0]} is a Conv1D of transformers, which stores its weight as (in, out); "
                f"only linear layers are supported, and GPT-2's are not"
            )


def _weight(layer: Linear) -> torch.Tensor:
    if isinstance(layer, nn.Linear):
        return layer.weight
    assert isinstance(layer.base, NF4Weight | DenseWeight)
    return layer.base.packed if isinstance(layer.base, NF4Weight) else layer.base.weight


def _refuse_other_base(layers: Mapping[str, Linear], config: AdapterConfig) -> None:
    wanted = METHODS[config.method].base
    for name, layer in layers.items():
        if isinstance(layer, AdaptedLinear):
            kind = "nf4" if isinstance(layer.base, NF4Weight) else "dense"
            if kind != wanted:
                raise InputError(
                    f"method {config.method!r} needs a {wanted} base, {name} is {kind}; "
                    f"load the model with base={wanted!r}"
                )


def _refuse_unfit(
    model: nn.Module, layers: Mapping[str, Linear], directions: list[str], config: AdapterConfig
) -> None:
    """Everything that can go wrong is found before the first layer is touched."""
    uses = _weight_uses(model)
    for name, layer in layers.items():
        if isinstance(layer, AdaptedLinear) and layer.has_adapter:
            raise InputError(f"{name} has an adapter already")
        if name in directions and METHODS[config.method].direction == "lora":
            refuse_large_rank(layer_config(config, name).r, name, layer.out_features, layer.in_features)
        others = [owner for owner in uses[id(_weight(layer))] if owner != name]
        if others:
            raise InputError(
                f"{name} shares its weight with {', '.join(others)}; "
                f"an adapter on a tied weight would change both: leave it out of adapter.targets"
            )


def _weight_uses(model: nn.Module) -> dict[int, list[str]]:
    """Which modules hold each weight."""
    uses: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for _, parameter in module.named_parameters(recurse=False):
            owner = name.removesuffix(".base")
            uses.setdefault(id(parameter), []).append(owner)
    return uses


def _adaptable(layer: Linear, config: AdapterConfig) -> AdaptedLinear:
    if isinstance(layer, AdaptedLinear):
        return layer
    return AdaptedLinear.of_linear(layer, METHODS[config.method].base)
