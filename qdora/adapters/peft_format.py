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
from qdora.adapters.whole import put, whole
from qdora.config import AdapterConfig
from qdora.errors import CheckpointError, InputError
from qdora.files import write_file, write_json, write_tensors

_MAGNITUDE = "lora_magnitude_vector"


def check_savable(model: nn.Module) -> None:
    """Find out before training, not after it, that there is nothing to save.

    Raises: InputError: the model has no adapter.
    """
    if not adapted_layers(model) and full_method(model) is None:
        raise InputError("the model has no adapter to save")


def save_adapter(model: nn.Module, directory: str | Path | None) -> None:
    """Write a model's adapter in PEFT's layout, each file whole or not at all.

    Args:
        model: as `inject` or `load_adapter` left it.  Of a sharded one, every process must call this.
        directory: None on the processes that only contribute their shards.
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
    if directory is None:
        return
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
    write_file(directory / WEIGHTS_FILE, lambda path: write_tensors(path, tensors, metadata))
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
    check_base(model, saved)
    named = saved.settings.get("qdora_method")
    if named in METHODS and METHODS[named].trains_base:
        tensors = {key.removeprefix(PREFIX): tensor for key, tensor in saved.others.items()}
        return load_full(model, tensors, named, str(directory))
    report = inject_saved(model, saved)
    fill_saved(model, saved)
    return report


def check_base(model: nn.Module, saved: SavedAdapter) -> None:
    """Compare fingerprints, where both sides have one.

    Raises: InputError: the adapter was made for another base.
    """
    present = base_fingerprint(model)
    if saved.fingerprint and present and saved.fingerprint != present:
        raise InputError(
            f"{saved.directory}: the adapter was made for another base: its fingerprint is "
            f"{saved.fingerprint[:16]}…, the loaded model's is {present[:16]}…"
        )


def inject_saved(model: nn.Module, saved: SavedAdapter) -> InjectionReport:
    """Give a model the layers of a saved adapter, at their fresh start; `fill_saved` puts its values there.

    Raises: InputError: settings that are not supported, an adapter made for other layers or shapes, a
            fully trained model, which has no layers to add.
    """
    if saved.settings.get("qdora_method") in METHODS and METHODS[saved.settings["qdora_method"]].trains_base:
        raise InputError(
            f"{saved.directory}: a fully trained model does not go onto a sharded base; use it without FSDP"
        )
    config = adapter_config(model, saved)
    _check_shapes(model, saved, config)
    return inject(model, config, seed=int(saved.settings.get("projection_prng_key") or 0))


@torch.no_grad()
def fill_saved(model: nn.Module, saved: SavedAdapter) -> None:
    """Put a saved adapter's values into a model that `inject_saved` prepared, sharded or not.

    Raises: CheckpointError: VeRA's matrices are missing or of another shape.
    """
    _fill_pair(model, saved)
    for name, layer in adapted_layers(model).items():
        _fill(layer, saved.layers[name])


def adapter_tensors(layers: Mapping[str, AdaptedLinear]) -> dict[str, torch.Tensor]:
    """The tensors of an adapter under PEFT's names; m in float32, the others in their own dtype.

    VeRA's matrices are left out where their seed is enough.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, layer in layers.items():
        for part, parameter in _factors(layer).items():
            assert layer.direction is not None
            tensors[f"{PREFIX}{name}.{part}"] = _stored(whole(parameter, layer.direction.storage))
        if layer.magnitude is not None:
            tensors[f"{PREFIX}{name}.{_MAGNITUDE}"] = _stored(layer.magnitude.value().float())
    pair = shared_pair(layers)
    if pair is not None and pair.seed is None:
        tensors |= {key: _stored(getattr(pair, part)) for part, key in PAIR_NAMES.items()}
    return tensors


def _factors(layer: AdaptedLinear) -> dict[str, torch.Tensor]:
    """The trained parameters of a layer's direction, by what PEFT calls them."""
    direction = layer.direction
    if isinstance(direction, LowRank):
        return {"lora_A.weight": direction.a_RI, "lora_B.weight": direction.b_OR}
    if isinstance(direction, Vera):
        return {"vera_lambda_d": direction.d_R, "vera_lambda_b": direction.b_O}
    return {}


def _stored(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous()


def _check_shapes(model: nn.Module, saved: SavedAdapter, config: AdapterConfig) -> None:
    layers = linear_layers(model)
    for name, tensors in saved.layers.items():
        layer, r = layers[name], layer_config(config, name).r
        expected = {
            "lora_A.weight": (r, layer.in_features),
            "lora_B.weight": (layer.out_features, r),
            _MAGNITUDE: (layer.out_features,),
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
    for part, parameter in _factors(layer).items():
        assert layer.direction is not None
        put(parameter, tensors[part], layer.direction.storage)
    if layer.magnitude is not None:
        layer.magnitude.load(tensors[_MAGNITUDE])
