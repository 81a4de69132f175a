"""Put adapters into a model: choose layers by name pattern, replace them, freeze the rest."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

from torch import nn

from qdora.adapters.direction import layer_seed
from qdora.adapters.fingerprint import combine, tensor_digest
from qdora.adapters.linear import AdaptedLinear, refuse_large_rank
from qdora.adapters.methods import METHODS
from qdora.config import AdapterConfig
from qdora.errors import InputError
from qdora.quant.nf4 import NF4Weight

Linear: TypeAlias = nn.Linear | AdaptedLinear


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

    Args:
        model: its linear layers are `nn.Linear` or, from `load_base`, `AdaptedLinear`.
        config: what to add and where.
        seed: of A; each layer draws its own from it and its name.
    Returns: the report; the model's output has not changed yet.
    Raises: InputError: a pattern matches no layer, r is larger than a layer's side, the method
        does not fit the base, a layer has an adapter already, or its weight is shared.
    """
    spec = METHODS[config.method]
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, AdaptedLinear))}
    directions = match_layers(layers, config.targets, "adapter.targets") if spec.direction else []
    magnitude_patterns = config.magnitude_targets or config.targets
    magnitudes = (
        match_layers(layers, magnitude_patterns, "adapter.magnitude_targets") if spec.magnitude else []
    )
    chosen = [name for name in layers if name in {*directions, *magnitudes}]
    _refuse_unfit(model, {name: layers[name] for name in chosen}, config)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name in chosen:
        layer = _adaptable(layers[name], config)
        layer.add_adapter(
            config, direction=name in directions, magnitude=name in magnitudes, seed=layer_seed(seed, name)
        )
        if layer is not layers[name]:
            model.set_submodule(name, layer)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return InjectionReport(tuple(directions), tuple(magnitudes), trainable, count_parameters(model))


def count_parameters(model: nn.Module) -> int:
    """Parameters of the model as its architecture counts them: packed 4-bit weights one by one."""
    packed = sum(m.packed.numel() for m in model.modules() if isinstance(m, NF4Weight))
    return packed + sum(p.numel() for p in model.parameters())


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """The layers that have an adapter, by full name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, AdaptedLinear) and _has_adapter(module)
    }


def initial_a_fingerprint(model: nn.Module) -> str:
    """Digest of all A: right after `inject`, arms of a comparison must agree on it."""
    return combine(
        {
            name: tensor_digest(name, layer.direction.a_RI)
            for name, layer in adapted_layers(model).items()
            if layer.direction is not None
        }
    )


def match_layers(names: Iterable[str], patterns: Iterable[str], key: str) -> list[str]:
    """The names that any pattern matches, in their own order.

    A pattern is a full name, a dotted suffix of one (`q_proj`, `mlp.up_proj`), or a glob over the
    full name (`model.layers.0.*`).

    Raises: InputError: a pattern matches nothing; the nearest last components are named.
    """
    names = list(names)
    matched: set[str] = set()
    for pattern in patterns:
        hits = [name for name in names if _matches(name, pattern)]
        if not hits:
            raise InputError(f"{key}: {pattern!r} matches no linear layer; {_nearest(pattern, names)}")
        matched.update(hits)
    return [name for name in names if name in matched]


def _matches(name: str, pattern: str) -> bool:
    if any(sign in pattern for sign in "*?["):
        return fnmatch.fnmatchcase(name, pattern)
    return name == pattern or name.endswith("." + pattern)


def _nearest(pattern: str, names: list[str]) -> str:
    ends = sorted({name.rsplit(".", 1)[-1] for name in names})
    near = difflib.get_close_matches(pattern.rsplit(".", 1)[-1], ends, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}this model has: {', '.join(ends) or 'no linear layers'}"


def _has_adapter(layer: AdaptedLinear) -> bool:
    return layer.direction is not None or layer.magnitude is not None


def _refuse_unfit(model: nn.Module, layers: dict[str, Linear], config: AdapterConfig) -> None:
    """Everything that can go wrong is found before the first layer is touched."""
    uses = _weight_uses(model)
    for name, layer in layers.items():
        if isinstance(layer, AdaptedLinear):
            weight = layer.base.packed if isinstance(layer.base, NF4Weight) else layer.base.weight
            if _has_adapter(layer):
                raise InputError(f"{name} has an adapter already")
            quantized = isinstance(layer.base, NF4Weight)
            if quantized != (METHODS[config.method].base == "nf4"):
                kind = "nf4" if quantized else "dense"
                raise InputError(
                    f"method {config.method!r} needs a {METHODS[config.method].base} base, {name} is {kind}; "
                    f"load the model with base={METHODS[config.method].base!r}"
                )
        else:
            weight = layer.weight
        if METHODS[config.method].direction:
            refuse_large_rank(config.r, name, layer.out_features, layer.in_features)
        owners = uses[id(weight)]
        if len(owners) > 1:
            raise InputError(
                f"{name} shares its weight with {', '.join(o for o in owners if o != name)}; "
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
