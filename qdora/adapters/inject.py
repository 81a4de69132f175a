"""Put adapters into a model: choose layers by name pattern, replace them, freeze the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn, TypeAlias

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from qdora.adapters import UPDATES
from qdora.adapters.convolution import AdaptedConv2d, plain_layer, refuse_convolution
from qdora.adapters.fingerprint import combine, tensor_digest
from qdora.adapters.init import layer_seed
from qdora.adapters.layer import AdaptedLinear, refuse_large_rank
from qdora.adapters.patterns import first_match, match_layers, matches
from qdora.adapters.tokens import TokenRows, token_rows
from qdora.adapters.trainers import save_as_adapter, save_as_before
from qdora.config import AdapterConfig, QuantizationName
from qdora.errors import InputError
from qdora.quant import Quantization
from qdora.quant.base import FrozenWeight
from qdora.quant.stored import adopt_linear

Linear: TypeAlias = nn.Linear | AdaptedLinear
Adaptable: TypeAlias = Linear | nn.Conv2d


@dataclass(frozen=True)
class InjectionReport:
    """What `inject` did.

    Attributes:
        update_layers, magnitude_layers: full names of the layers that got each.
        trainable: parameters that are trained.
        total: parameters of the model, a quantized weight counted as one parameter each.
    """

    update_layers: tuple[str, ...]
    magnitude_layers: tuple[str, ...]
    trainable: int
    total: int

    @property
    def percentage(self) -> float:
        """Trainable parameters in percent of all."""
        return 100 * self.trainable / self.total

    def __str__(self) -> str:
        return (
            f"{len(self.update_layers)} layers with a low-rank update, {len(self.magnitude_layers)} with a "
            f"magnitude; {self.trainable:,} of {self.total:,} parameters trained ({self.percentage:.2f}%)"
        )


def inject(
    model: nn.Module, config: AdapterConfig, *, quantization: QuantizationName = "none", seed: int = 0
) -> InjectionReport:
    """Adapt the layers that the configuration names, in place, and freeze everything else.

    Args:
        model: any module; its linear layers are `nn.Linear`, bitsandbytes' 4-bit ones (adopted with their
            bytes) or, from `load_base`, `AdaptedLinear`.  Of its convolutions `nn.Conv2d` take an adapter.
        config: what to add and where.
        quantization: format that the weight of an `nn.Linear` becomes; the others keep theirs.
        seed: of the updates' random values, of which each layer draws its own from it and its name.
    Returns: the report; the model's output has not changed yet, but for quantization that was asked for.
    Raises: InputError: a pattern matches no layer, r is larger than a layer's side, a layer has an adapter
        already, its weight is shared or quantized in a way that is not supported, or a magnitude is to start
        from an original weight that is not at hand.
    """
    layers = adaptable_layers(model)
    update_names, magnitude_names = _choose(model, layers, config)
    chosen = {name: layers[name] for name in layers if name in {*update_names, *magnitude_names}}
    _refuse_unfit(model, chosen, update_names, config)
    bases = {
        name: adopt_linear(layer, name) for name, layer in chosen.items() if isinstance(layer, nn.Linear)
    }
    if config.magnitude_start == "original":
        for name in magnitude_names:
            weight = bases.get(name) or getattr(chosen[name], "base", None)
            # On the meta device the original is yet to be read.
            if weight is not None and weight.quantization != "none" and weight.device.type != "meta":
                refuse_lost_original(name, weight.quantization)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    kind, shared = UPDATES[config.type], None
    if kind is not None:
        shapes = [layer_shape(chosen[name]) for name in update_names]
        device = next(chosen[update_names[0]].parameters()).device
        shared = kind.create_shared(shapes, config, device, seed)
    for name, layer in chosen.items():
        original_OI = None if bases.get(name) else _unquantized(layer)
        if not isinstance(layer, AdaptedLinear):
            if isinstance(layer, nn.Linear):
                layer = AdaptedLinear(bases[name] or _from_dense(layer, name, quantization), layer.bias)
            else:
                layer = AdaptedConv2d(layer)
            model.set_submodule(name, layer)
        layer.add_adapter(
            layer_config(config, name),
            update=name in update_names,
            magnitude=name in magnitude_names,
            seed=layer_seed(seed, name),
            shared=shared,
            original_OI=original_OI,
        )
    save_as_adapter(model)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return InjectionReport(tuple(update_names), tuple(magnitude_names), trainable, count_parameters(model))


def linear_layers(model: nn.Module) -> dict[str, Linear]:
    """The linear layers, by full name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, AdaptedLinear))}


def adaptable_layers(model: nn.Module) -> dict[str, Adaptable]:
    """The layers that can carry an adapter, linear ones and convolutions, by full name."""
    kinds = (nn.Linear, AdaptedLinear, nn.Conv2d)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def layer_shape(layer: Adaptable) -> tuple[int, int]:
    """(out, in) of a layer's weight as a matrix: the patches of a convolution are its inputs."""
    if isinstance(layer, nn.Conv2d):
        return layer.out_channels, layer.weight[0].numel()
    return layer.out_features, layer.in_features


def decoder_linears(model: nn.Module) -> dict[str, Linear]:
    """The linear layers but the output layer, by full name."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    return {name: layer for name, layer in linear_layers(model).items() if layer is not output}


def expert_tensors(model: nn.Module) -> list[str]:
    """Parameters that hold the matrices of several experts in one tensor, by full name."""
    return [
        f"{name}.{leaf}"
        for name, module in model.named_modules()
        for leaf, parameter in module.named_parameters(recurse=False)
        if parameter.dim() > 2 and "expert" in f"{name} {type(module).__name__}".lower()
    ]


EXPERTS = (
    "a mixture of experts is not supported: its feed-forward layers hold the matrices of all experts in "
    "3-D parameters, and no linear layer"
)


def count_parameters(model: nn.Module) -> int:
    """Parameters of the model as its architecture counts them: quantized weights one by one."""
    frozen = [m for m in model.modules() if isinstance(m, FrozenWeight)]
    inside = {id(p) for weight in frozen if weight.trained is None for p in weight.parameters()}
    shared = sum(p.numel() for p in model.parameters() if id(p) not in inside)
    return shared + sum(weight.logical_parameters for weight in frozen if weight.trained is None)


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """The layers that have an adapter, by full name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, AdaptedLinear) and module.has_adapter
    }


@torch.no_grad()
def refuse_overflow(model: nn.Module, where: str) -> None:
    """Refuse an adapter whose weight norms overflow: divided by infinity, a layer would add nothing, unseen.

    Args:
        model: not sharded.
    Raises: InputError: `where` and the layer are named.
    """
    for name, layer in adapted_layers(model).items():
        if layer.magnitude is not None and not torch.isfinite(layer.weight_norm()).all():
            raise InputError(f"{where}: values of {name} are so large that the norm of its weight overflows")


def initial_update_fingerprint(model: nn.Module) -> str:
    """Digest of the initial values of all updates, of which arms of a comparison may have to agree.

    Of the seeds and shapes alone: the model may be on the meta device.
    """
    digests = {}
    for name, layer in adapted_layers(model).items():
        if layer.update is not None:
            for key, value in layer.update.initial_values().items():
                digests[f"{name}.{key}"] = tensor_digest(f"{name}.{key}", value)
    return combine(digests)


def merge_adapters(model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Compute every adapted layer with one dense weight until `unmerge_adapters`.

    The output differs by the rounding of the merged weight alone: relative 1e-5 for float32, 2e-3
    for float16 and 2e-2 for bfloat16, the bounds that the tests hold.  The stored weights stay as they are.

    Args:
        dtype: of the merged copies, which need memory beside the stored weights.
    """
    for layer in adapted_layers(model).values():
        layer.merge(dtype)


def unmerge_adapters(model: nn.Module) -> None:
    """Compute with stored weight and adapter again: bit for bit what was there before the merge."""
    for layer in adapted_layers(model).values():
        layer.unmerge()


def merge_and_unload(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replace every adapted layer by a plain one with the merged weight, in place.

    What is left is the model of its library, for that library's own `save_pretrained`.

    Args:
        dtype: of the merged weights; the stored ones' unless told otherwise, float32 of quantized ones.
    Returns: the model.
    Raises: InputError: the norm of a weight overflows, or rows of tokens were trained too.
    """
    refuse_overflow(model, "the model")
    if rows := token_rows(model):
        raise InputError(f"{next(iter(rows))} has trained rows of tokens: use merge_and_export")
    for name, layer in linear_layers(model).items():
        if isinstance(layer, AdaptedLinear):
            model.set_submodule(name, plain_layer(layer, dtype))
    save_as_before(model)
    return model


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The base model for a while, for example as a reference or as the baseline of an evaluation."""
    parts: list[AdaptedLinear | TokenRows] = [*adapted_layers(model).values(), *token_rows(model).values()]
    layers = [part for part in parts if part.enabled]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


def layer_config(config: AdapterConfig, name: str) -> AdapterConfig:
    """The configuration with the rank and alpha that its patterns give to one layer."""
    if not config.rank_pattern and not config.alpha_pattern:
        return config
    own = {
        "r": first_match(config.rank_pattern, name, config.r),
        "alpha": first_match(config.alpha_pattern, name, config.alpha),
    }
    return config.model_copy(update=own)


def _choose(
    model: nn.Module, layers: Mapping[str, Adaptable], config: AdapterConfig
) -> tuple[list[str], list[str]]:
    """Names of the layers that get an update, and of those that get a magnitude."""
    _refuse_unsupported(model, layers, config)
    updates = match_layers(layers, config.targets, "adapter.targets") if config.type != "none" else []
    patterns = config.magnitude_targets or config.targets
    magnitudes = match_layers(layers, patterns, "adapter.magnitude_targets") if config.dora else []
    if config.type != "none":
        match_layers(updates, config.rank_pattern, "adapter.rank_pattern")
        match_layers(updates, config.alpha_pattern, "adapter.alpha_pattern")
    if not updates and not magnitudes:
        raise InputError("adapter.type 'none' with adapter.dora false adds nothing to a model")
    return updates, magnitudes


def _refuse_unsupported(model: nn.Module, layers: Mapping[str, Adaptable], config: AdapterConfig) -> None:
    """A pattern that means layers of another kind only is told so, not that it matches nothing."""
    experts = expert_tensors(model)
    for pattern in (*config.targets, *(config.magnitude_targets or ())) if experts else ():
        if not any(matches(name, pattern) for name in layers):
            attention = sorted({name.rsplit(".", 1)[-1] for name in layers})
            raise InputError(
                f"adapter.targets: {pattern!r} matches no linear layer of this {type(model).__name__}; "
                f"{EXPERTS} ({experts[0]}); this model has: {', '.join(attention)}"
            )
    others = {
        name: module
        for name, module in model.named_modules()
        if name not in layers and any(key in ("weight", "qweight") for key in dict(_own_tensors(module)))
    }
    for pattern in (*config.targets, *(config.magnitude_targets or ())):
        hits = [name for name in others if matches(name, pattern)]
        if not hits or any(matches(name, pattern) for name in layers):
            continue
        if isinstance(others[hits[0]], Conv1D):
            raise InputError(
                f"{hits[0]} is a Conv1D of transformers, which stores its weight as (in, out); "
                f"only linear layers and Conv2d are supported, and GPT-2's are not"
            )
        raise InputError(
            f"{hits[0]} is a {type(others[hits[0]]).__name__}; only linear layers and Conv2d are supported"
        )


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _refuse_unfit(
    model: nn.Module, layers: Mapping[str, Adaptable], update_names: list[str], config: AdapterConfig
) -> None:
    """Everything that can go wrong is found before the first layer is touched."""
    users = _users_of_weights(model)
    for name, layer in layers.items():
        if isinstance(layer, AdaptedLinear) and layer.has_adapter:
            raise InputError(f"{name} has an adapter already")
        if name in update_names:
            refuse_large_rank(layer_config(config, name), name, layer_shape(layer))
        if isinstance(layer, nn.Conv2d):
            refuse_convolution(layer, name, config.type if name in update_names else "none")
        if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention):
            raise InputError(
                f"{name} belongs to a MultiheadAttention of torch, which reads its weight and does not call "
                f"it, so that an adapter would change nothing: leave it out of adapter.targets"
            )
        weights = layer.base.parameters() if isinstance(layer, AdaptedLinear) else [layer.weight]
        others = sorted({user for weight in weights for user in users[id(weight)] if user != name})
        if others:
            raise InputError(
                f"{name} shares its weight with {', '.join(others)}; "
                f"an adapter on a tied weight would change both: leave it out of adapter.targets"
            )


def _users_of_weights(model: nn.Module) -> dict[int, list[str]]:
    """Which modules hold each weight."""
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for _, parameter in module.named_parameters(recurse=False):
            users.setdefault(id(parameter), []).append(name.removesuffix(".base"))
    return users


def refuse_lost_original(name: str, quantization: str) -> NoReturn:
    """A magnitude cannot start from an original weight that is not at hand.

    Args:
        name: of a layer that is quantized already.
        quantization: its format.
    Raises: InputError: naming both.
    """
    raise InputError(
        f"adapter.magnitude_start 'original': {name} is {quantization} already, and the weight that it was "
        f"quantized from is not at hand; allowed there: quantized"
    )


def _unquantized(layer: Adaptable) -> torch.Tensor | None:
    """(O, I) the weight of a layer that is not quantized and not on the meta device."""
    weight = getattr(layer.base, "weight", None) if isinstance(layer, AdaptedLinear) else layer.weight
    return weight.detach().flatten(1) if isinstance(weight, torch.Tensor) and not weight.is_meta else None


def _from_dense(layer: nn.Linear, name: str, quantization: QuantizationName) -> FrozenWeight:
    try:
        return Quantization(quantization).from_dense(layer.weight.detach())
    except ValueError as error:
        raise InputError(f"{name}: {error}") from None
