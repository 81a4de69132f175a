"""Adapters on disk in PEFT's layout: adapter_config.json and adapter_model.safetensors.

PEFT reads what is written here and the other way round, for the adapters that PEFT has.  The others
stand in the same layout under a peft_type of their own, QDORA, so that PEFT refuses them by name
instead of computing something else.  The magnitude is stored as m and not as its offset.  The base's
fingerprint stands in the safetensors metadata, where PEFT does not look.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qdora.adapters.base import LowRankUpdate, assign_full, full_tensor
from qdora.adapters.fingerprint import base_fingerprint
from qdora.adapters.full import full_report, full_tensors, is_fully_trained, load_full, trained_storage
from qdora.adapters.inject import (
    Adaptable,
    InjectionReport,
    adaptable_layers,
    adapted_layers,
    inject,
    layer_config,
    layer_shape,
)
from qdora.adapters.layer import AdaptedLinear
from qdora.adapters.lora import LoraUpdate
from qdora.adapters.peft_settings import refuse_unchosen
from qdora.adapters.saved import (
    CONFIG_FILE,
    FINGERPRINT,
    FULL,
    KINDS,
    MAGNITUDE,
    OWN_TYPE,
    PREFIX,
    WEIGHTS_FILE,
    SavedAdapter,
    read_saved,
)
from qdora.adapters.tokens import (
    SETTING,
    SUFFIX,
    assign_tokens,
    saved_rows,
    tokens_settings,
    tokens_tensors,
)
from qdora.adapters.vocabulary import refuse_changed, refuse_other_vocabulary, vocabulary_copies
from qdora.config import AdapterConfig
from qdora.errors import CheckpointError, InputError
from qdora.files import write_file, write_json, write_tensors


def check_savable(model: nn.Module) -> None:
    """Find out before training, not after it, that there is nothing to save.

    Raises: InputError: the model has no adapter.
    """
    if not adapted_layers(model) and not is_fully_trained(model):
        raise InputError("the model has no adapter to save")


def save_adapter(model: nn.Module, directory: str | Path | None) -> None:
    """Write a model's adapter in PEFT's layout, each file written atomically; a collective under FSDP.

    Args:
        model: as `inject` or `load_adapter` left it.
        directory: None on the ranks that only contribute their shards.
    Raises: InputError: the model has no adapter, or the folder cannot be written.
    """
    check_savable(model)
    layers = adapted_layers(model)
    if layers:
        settings, tensors = _settings(layers), _adapter_tensors(layers)
    else:
        settings = {"peft_type": OWN_TYPE, "adapter_type": FULL}
        tensors = {PREFIX + name: tensor for name, tensor in full_tensors(model).items()}
    if rows := tokens_settings(model):
        settings[SETTING] = rows
        if settings["peft_type"] != LoraUpdate.peft_type:  # PEFT has them beside LoRA alone
            settings |= {
                "adapter_type": settings.get("adapter_type", _type_of(layers)),
                "peft_type": OWN_TYPE,
            }
        tensors |= {key: t.cpu().contiguous() for key, t in tokens_tensors(model, PREFIX).items()}
    if directory is None:
        return
    settings |= {
        "task_type": _task_type(model),
        "base_model_name_or_path": getattr(getattr(model, "config", None), "name_or_path", None) or None,
        "inference_mode": True,
    }
    metadata = {"format": "pt"}
    if fingerprint := base_fingerprint(model):
        metadata[FINGERPRINT] = fingerprint
    directory = Path(directory)
    write_json(directory / CONFIG_FILE, settings)
    # Last: an adapter counts as complete where its weights file is there.
    write_file(directory / WEIGHTS_FILE, lambda path: write_tensors(path, tensors, metadata))


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
    report = full_report(model) if saved.is_full else inject_saved(model, saved)
    assign_saved(model, saved)
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
    """Give a model the layers of a saved adapter, at their initial values; `assign_saved` writes its own.

    Raises: InputError: settings that are not supported, an adapter made for other layers or shapes.
    """
    config = saved_config(model, saved)
    check_shapes(model, saved, config)
    return inject(model, config, seed=saved_seed(saved))


def saved_seed(saved: SavedAdapter) -> int:
    """The seed of what the updates share, for `inject`."""
    kind = saved.kind_of_tensors
    return 0 if kind is None else kind.seed_from_peft(saved.settings)


@torch.no_grad()
def assign_saved(model: nn.Module, saved: SavedAdapter) -> None:
    """Write a saved adapter's values into a model that `inject_saved` prepared, sharded or not.

    A fully trained model's values replace the model's own.

    Raises: CheckpointError: tensors that all layers share are missing or of another shape.
        InputError: as `load_full`.
    """
    if saved.is_full:
        load_full(model, saved.full_tensors, str(saved.directory))
        return
    layers = adapted_layers(model)
    updates = {name: layer.update for name, layer in layers.items() if layer.update is not None}
    kind = type(next(iter(updates.values()))) if updates else None
    shared = {key: t for key, t in saved.others.items() if kind is not None and key in kind.shared_keys}
    if kind is not None and (shared or saved.settings.get("save_projection")):
        try:
            kind.load_shared(updates, shared)
        except ValueError as error:
            raise CheckpointError(f"{saved.directory / WEIGHTS_FILE}: {error}") from None
    for name, layer in layers.items():
        tensors = saved.layers[name]
        if layer.update is not None:
            for attribute, key in layer.update.peft_keys.items():
                parameter = getattr(layer.update, attribute)
                assign_full(parameter, tensors[key].reshape(parameter.shape), layer.update.storage)
            layer.update.load_extra(tensors, saved.settings, layer.base)
            rest_OI = layer.update.residual(layer.base)
            if rest_OI is not None:
                layer.replace_base(rest_OI)
        if layer.magnitude is not None:
            layer.magnitude.load(tensors[MAGNITUDE].flatten())
    rows = saved_rows(model, saved.settings, saved.others, PREFIX)
    assign_tokens(model, rows, trained_storage(model) or torch.float32)
    for key, (name, leaf) in vocabulary_copies(model, saved.others, PREFIX).items():
        refuse_changed(model, name, leaf, saved.others[key], str(saved.directory))


def _settings(layers: Mapping[str, AdaptedLinear]) -> dict[str, Any]:
    """What PEFT needs to know, or what we do where PEFT has no such adapter."""
    updates = {name: layer.update for name, layer in layers.items() if layer.update is not None}
    magnitudes = {name for name, layer in layers.items() if layer.magnitude is not None}
    kind: type[LowRankUpdate] = type(next(iter(updates.values()))) if updates else LoraUpdate
    settings: dict[str, Any] = {"target_modules": sorted(updates), "bias": "none", "fan_in_fan_out": False}
    settings["peft_type"] = kind.peft_type
    if kind.peft_magnitude:
        settings["use_dora"] = bool(magnitudes)
    settings |= kind.peft_settings(updates) if updates else {}
    lacking = magnitudes and not (kind.peft_magnitude and magnitudes == updates.keys())
    if lacking or any(update.extra_tensors() for update in updates.values()):
        settings |= {
            "peft_type": OWN_TYPE,
            "adapter_type": kind.kind if updates else "none",
            "dora": bool(magnitudes),
            "magnitude_modules": sorted(magnitudes),
        }
    return settings


def _task_type(model: nn.Module) -> str | None:
    """The wrapper that PEFT puts around the model; a plain one around what does not generate text."""
    if not hasattr(model, "prepare_inputs_for_generation"):
        return None
    seq2seq = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return "SEQ_2_SEQ_LM" if seq2seq else "CAUSAL_LM"


def _file_shape(layer: Adaptable, part: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a tensor of a layer has in a file: PEFT's A and B of a convolution are convolutions.

    Args:
        part: PEFT's key.
        shape: in the layer, whose weight is a matrix.
    """
    kernel = layer.weight.shape[2:]
    if not kernel:
        return shape
    if part == "lora_A.weight":
        return (shape[0], *layer.weight.shape[1:])
    if part == "lora_B.weight":
        return (*shape, 1, 1)
    return (1, *shape, 1, 1) if part == MAGNITUDE else shape


def _type_of(layers: Mapping[str, AdaptedLinear]) -> str:
    return next((layer.update.kind for layer in layers.values() if layer.update is not None), "none")


def _adapter_tensors(layers: Mapping[str, AdaptedLinear]) -> dict[str, torch.Tensor]:
    """The tensors of an adapter under PEFT's names; m in float32, the others in their own dtype."""
    tensors: dict[str, torch.Tensor] = {}
    updates = {name: layer.update for name, layer in layers.items() if layer.update is not None}
    for name, layer in layers.items():
        own: dict[str, torch.Tensor] = {}
        if (update := updates.get(name)) is not None:
            own = {k: full_tensor(getattr(update, a), update.storage) for a, k in update.peft_keys.items()}
            own |= update.extra_tensors()
        if layer.magnitude is not None:
            own[MAGNITUDE] = layer.magnitude.value().float()
        for key, tensor in own.items():
            shape = _file_shape(layer, key, tuple(tensor.shape))
            tensors[f"{PREFIX}{name}.{key}"] = tensor.reshape(shape)
    if updates:
        tensors |= type(next(iter(updates.values()))).shared_tensors(updates)
    return {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}


def saved_config(model: nn.Module, saved: SavedAdapter) -> AdapterConfig:
    """The configuration whose injection makes the layers that the file's tensors belong to.

    Raises: InputError: settings that are not supported, an adapter made for other layers.
    """
    settings, path = saved.settings, saved.directory
    copies = vocabulary_copies(model, saved.others, PREFIX)
    for key, (name, _) in copies.items():
        refuse_other_vocabulary(model, name, saved.others[key].shape[0], str(path))
    known = {*copies, *(key for kind in KINDS for key in kind.shared_keys)}
    strangers = [key for key in saved.others if key not in known and not key.endswith(SUFFIX)]
    if strangers:
        raise InputError(f"{path / WEIGHTS_FILE}: tensor {strangers[0]!r} is not part of a supported adapter")
    layers = adaptable_layers(model)
    missing = [name for name in saved.layers if name not in dict(model.named_modules())]
    if missing or not saved.layers:
        raise InputError(
            f"{path}: the adapter was made for another base: the model has no layer "
            f"{', '.join(missing[:3]) or '(the adapter is empty)'}"
        )
    unfit = [name for name in saved.layers if name not in layers]
    if unfit:
        raise InputError(
            f"{path}: the adapter was made for another base: {unfit[0]} is no linear layer and no Conv2d"
        )
    _check_parts(saved)
    updates = [name for name, parts in saved.layers.items() if parts.keys() - {MAGNITUDE}]
    magnitudes = [name for name, parts in saved.layers.items() if MAGNITUDE in parts]
    kind = saved.kind_of_tensors
    of_updates = [t for parts in saved.layers.values() for key, t in parts.items() if key != MAGNITUDE]
    try:
        saved_rows(model, settings, saved.others, PREFIX)
        own = {} if kind is None else kind.config_from_peft(settings, updates)
        if saved.kind is not None:
            refuse_unchosen(settings, saved.layers)
            for name in updates:
                saved.kind.derives_base(settings, _format_of(layers[name]))
        return AdapterConfig(
            type="none" if kind is None else kind.kind,
            dora=bool(magnitudes),
            targets=tuple(updates or magnitudes),
            magnitude_targets=tuple(magnitudes) or None,
            dtype="bfloat16" if all(t.dtype == torch.bfloat16 for t in of_updates) else "float32",
            **own,
        )
    except KeyError as error:
        raise InputError(f"{path / CONFIG_FILE}: setting {error} is missing") from None
    except (TypeError, ValueError) as error:
        raise InputError(f"{path / CONFIG_FILE}: {error}") from None


def _format_of(layer: Adaptable) -> str:
    if isinstance(layer, AdaptedLinear):
        return layer.base.quantization
    return "none" if layer.weight.is_floating_point() else type(layer).__name__


def _check_parts(saved: SavedAdapter) -> None:
    """A half adapter is refused: a layer with one factor, or one without the magnitude of the others."""
    everywhere = set() if saved.kind is None else set(saved.kind.peft_keys.values())
    own = set() if saved.kind_of_tensors is None else set(saved.kind_of_tensors.peft_keys.values())
    # A variant that shares keys with the file's own is not in it.
    of_kinds = [keys for kind in KINDS if (keys := set(kind.peft_keys.values())) == own or not keys & own]
    groups = [*of_kinds, *(set(kind.extra_keys) for kind in KINDS)]
    if saved.kind is not None and saved.kind.peft_magnitude and saved.settings.get("use_dora"):
        everywhere.add(MAGNITUDE)
    for name, tensors in saved.layers.items():
        wanted = set(everywhere)
        for group in groups:
            wanted |= group if group & tensors.keys() else set()
        lacking = sorted(wanted - tensors.keys())
        if lacking:
            raise CheckpointError(f"{saved.directory / WEIGHTS_FILE}: {name} lacks {', '.join(lacking)}")


def check_shapes(model: nn.Module, saved: SavedAdapter, config: AdapterConfig) -> None:
    """Raises: InputError: a tensor of another shape than the model's layer and the rank ask for."""
    layers = adaptable_layers(model)
    for name, tensors in saved.layers.items():
        layer, r = layers[name], layer_config(config, name).r
        shape = layer_shape(layer)
        inside = {
            MAGNITUDE: shape[:1],
            **{k: v for kind in KINDS for k, v in kind.saved_shapes(shape, r).items()},
        }
        expected = {key: _file_shape(layer, key, size) for key, size in inside.items()}
        for part, tensor in tensors.items():
            if tuple(tensor.shape) != expected[part]:
                if expected[part][0] == shape[0]:
                    refuse_other_vocabulary(model, name, tensor.shape[0], str(saved.directory))
                raise InputError(
                    f"{saved.directory}: the adapter was made for another base or rank: {name}.{part} has "
                    f"shape {tuple(tensor.shape)}, expected {expected[part]}"
                )
