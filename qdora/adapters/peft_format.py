"""Adapters on disk in PEFT's layout: adapter_config.json and adapter_model.safetensors.

PEFT reads what is written here and the other way round, for the methods that PEFT has.  The others
stand in the same layout under a peft_type of their own, QDORA, so that PEFT refuses them by name
instead of computing something else.  The magnitude is stored whole, m and not its offset.  The base's
fingerprint stands in the safetensors metadata, where PEFT does not look.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from qdora.adapters.direction import LowRank, Vera
from qdora.adapters.fingerprint import base_fingerprint
from qdora.adapters.full import full_method, full_tensors, load_full
from qdora.adapters.inject import InjectionReport, adapted_layers, inject, linear_layers
from qdora.adapters.linear import AdaptedLinear
from qdora.adapters.methods import METHODS
from qdora.adapters.patterns import layer_config
from qdora.adapters.peft_layout import (
    CONFIG_FILE,
    FINGERPRINT_KEY,
    OWN_TYPE,
    PAIR_NAMES,
    PREFIX,
    WEIGHTS_FILE,
    SavedAdapter,
    read_saved,
)
from qdora.adapters.peft_settings import adapter_config, peft_settings, shared_pair
from qdora.config import AdapterConfig
from qdora.errors import CheckpointError, InputError
from qdora.files import write_file, write_json


def check_savable(model: nn.Module) -> None:
    """Find out before training, not after it, that there is nothing to save.

    Raises: InputError: the model has no adapter.
    """
    if not adapted_layers(model) and full_method(model) is None:
        raise InputError("the model has no adapter to save")


def save_adapter(model: nn.Module, directory: str | Path) -> None:
    """Write a model's adapter in PEFT's layout, each file whole or not at all.

    Args:
        model: as `inject` or `load_adapter` left it.
    Raises: InputError: the model has no adapter, or the folder cannot be written.
    """
    check_savable(model)
    layers = adapted_layers(model)
    if layers:
        config, tensors = peft_settings(layers), adapter_tensors(layers)
    else:
        config, tensors = (
            {"peft_type": OWN_TYPE, "qdora_method": full_method(model)},
            full_tensors(model, PREFIX),
        )
    config = {
        **config,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": getattr(getattr(model, "config", None), "name_or_path", None) or None,
        "inference_mode": True,
    }
    metadata = {"format": "pt"}
    fingerprint = base_fingerprint(model)
    if fingerprint:
        metadata[FINGERPRINT_KEY] = fingerprint
    directory = Path(directory)
    write_file(directory / WEIGHTS_FILE, lambda path: save_file(tensors, path, metadata))
    write_json(directory / CONFIG_FILE, config)


def load_adapter(model: nn.Module, directory: str | Path) -> InjectionReport:
    """Put a saved adapter, ours or PEFT's, onto a model that has none.

    Args:
        model: from `load_base`, or any model with `nn.Linear` layers.
        directory: holds adapter_config.json and adapter_model.safetensors.
    Returns: the injection report.
    Raises: InputError: files missing, settings that are not supported, an adapter made for
        another base (other layers, shapes or fingerprint).
        CheckpointError: the weights file is truncated or corrupt.
    """
    saved = read_saved(Path(directory))
    present = base_fingerprint(model)
    if saved.fingerprint and present and saved.fingerprint != present:
        raise InputError(
            f"{directory}: the adapter was made for another base: its fingerprint is "
            f"{saved.fingerprint[:16]}…, the loaded model's is {present[:16]}…"
        )
    named = saved.settings.get("qdora_method")
    if named in METHODS and METHODS[named].trains_base:
        tensors = {key.removeprefix(PREFIX): tensor for key, tensor in saved.others.items()}
        return load_full(model, tensors, named, str(directory))
    config = adapter_config(model, saved)
    _check_shapes(model, saved, config)
    report = inject(model, config, seed=int(saved.settings.get("projection_prng_key") or 0))
    with torch.no_grad():
        _fill_pair(model, saved)
        for name, layer in adapted_layers(model).items():
            _fill(layer, saved.layers[name])
    return report


def adapter_tensors(layers: Mapping[str, AdaptedLinear]) -> dict[str, torch.Tensor]:
    """The tensors of an adapter under PEFT's names; m in float32, the others in their own dtype.

    VeRA's matrices are left out where their seed is enough.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, layer in layers.items():
        for part, tensor in _layer_tensors(layer).items():
            tensors[f"{PREFIX}{name}.{part}"] = _stored(tensor)
    pair = shared_pair(layers)
    if pair is not None and pair.seed is None:
        tensors |= {key: _stored(getattr(pair, part)) for part, key in PAIR_NAMES.items()}
    return tensors


def _layer_tensors(layer: AdaptedLinear) -> dict[str, torch.Tensor]:
    direction = layer.direction
    tensors: dict[str, torch.Tensor] = {}
    if isinstance(direction, LowRank):
        tensors = {"lora_A.weight": direction.a_RI, "lora_B.weight": direction.b_OR}
    elif isinstance(direction, Vera):
        tensors = {"vera_lambda_d": direction.d_R, "vera_lambda_b": direction.b_O}
    if layer.magnitude is not None:
        tensors["lora_magnitude_vector"] = layer.magnitude.value().float()
    return tensors


def _stored(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous()


def _check_shapes(model: nn.Module, saved: SavedAdapter, config: AdapterConfig) -> None:
    layers = linear_layers(model)
    for name, tensors in saved.layers.items():
        layer, r = layers[name], layer_config(config, name).r
        expected = {
            "lora_A.weight": (r, layer.in_features),
            "lora_B.weight": (layer.out_features, r),
            "lora_magnitude_vector": (layer.out_features,),
            "vera_lambda_d": (r,),
            "vera_lambda_b": (layer.out_features,),
        }
        for part, tensor in tensors.items():
            if tuple(tensor.shape) != expected[part]:
                raise InputError(
                    f"{saved.directory}: the adapter was made for another base or rank: {name}.{part} has "
                    f"shape {tuple(tensor.shape)}, expected {expected[part]}"
                )


def _fill_pair(model: nn.Module, saved: SavedAdapter) -> None:
    """VeRA's matrices where the file brings them: other than its seed gives, they are the ones that count."""
    pair = shared_pair(adapted_layers(model))
    if pair is None or not saved.others:
        return
    for part, key in PAIR_NAMES.items():
        own, given = getattr(pair, part), saved.others.get(key)
        if given is None or given.shape != own.shape:
            got = "missing" if given is None else f"of shape {tuple(given.shape)}"
            raise CheckpointError(
                f"{saved.directory / WEIGHTS_FILE}: {key} is {got}, expected shape {tuple(own.shape)}"
            )
        if not torch.equal(given.to(own), own):
            own.copy_(given)
            pair.seed = None


def _fill(layer: AdaptedLinear, tensors: Mapping[str, torch.Tensor]) -> None:
    for part, parameter in _layer_tensors(layer).items():
        if part != "lora_magnitude_vector":
            parameter.copy_(tensors[part])
    if layer.magnitude is not None:
        layer.magnitude.load(tensors["lora_magnitude_vector"])
