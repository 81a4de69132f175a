"""Adapters on disk in PEFT's layout: adapter_config.json and adapter_model.safetensors.

PEFT reads what is written here and the other way round, for the adapters that PEFT has.  The others
stand in the same layout under a peft_type of their own, QDORA, so that PEFT refuses them by name
instead of computing something else.  The magnitude is stored as m and not as its offset.  The base's
fingerprint stands in the safetensors metadata, where PEFT does not look.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from qdora.adapters import UPDATES, update_with_keys
from qdora.adapters.base import LowRankUpdate, assign_full, full_tensor, refuse_non_finite
from qdora.adapters.fingerprint import base_fingerprint
from qdora.adapters.full import full_report, full_tensors, is_fully_trained, load_full
from qdora.adapters.inject import InjectionReport, Linear, adapted_layers, inject, layer_config, linear_layers
from qdora.adapters.layer import AdaptedLinear
from qdora.adapters.lora import LoraUpdate
from qdora.adapters.peft_settings import refuse_unchosen, refuse_unsupported
from qdora.adapters.vocabulary import refuse_changed, refuse_other_vocabulary, vocabulary_copies
from qdora.config import AdapterConfig, UpdateType
from qdora.errors import CheckpointError, InputError, suggest
from qdora.files import read_json, write_file, write_json, write_tensors

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
OWN_TYPE = "QDORA"
"""peft_type of the adapters that PEFT lacks; `adapter_type` and `dora` say which."""
FULL = "full"
"""adapter_type of a fully trained model."""

_PREFIX = "base_model.model."
_FINGERPRINT = "qdora_base_fingerprint"
_MAGNITUDE = "lora_magnitude_vector"
_KINDS = [kind for kind in UPDATES.values() if kind is not None]
_PARTS = (*(key for kind in _KINDS for key in (*kind.peft_keys.values(), *kind.extra_keys)), _MAGNITUDE)


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter as it was read, before it meets a model.

    Attributes:
        settings: adapter_config.json.
        layers: tensors of each layer by PEFT's key.
        others: tensors that belong to no layer's adapter.
        fingerprint: of the base that it was trained on; None where it is not known.
    """

    directory: Path
    settings: dict[str, Any]
    layers: dict[str, dict[str, torch.Tensor]]
    others: dict[str, torch.Tensor]
    fingerprint: str | None

    @property
    def is_full(self) -> bool:
        """Whether it is a fully trained model."""
        return self.settings.get("adapter_type") == FULL

    @property
    def full_tensors(self) -> dict[str, torch.Tensor]:
        """A fully trained model's tensors by transformers' names."""
        return {key.removeprefix(_PREFIX): tensor for key, tensor in self.others.items()}

    @property
    def changes_base(self) -> bool:
        """Whether the base weights have to be changed when it is loaded."""
        extra = {key for kind in _KINDS for key in kind.extra_keys}
        derived = self.kind is not None and self.kind.derives_base(self.settings)
        return derived or any(extra & tensors.keys() for tensors in self.layers.values())

    @property
    def kind(self) -> type[LowRankUpdate] | None:
        """The variant of PEFT's name for it; None of a file that is ours alone."""
        return next((kind for kind in _KINDS if kind.peft_type == self.settings["peft_type"]), None)

    @property
    def kind_of_tensors(self) -> type[LowRankUpdate] | None:
        """The variant that the layers' tensors belong to; None where there are magnitudes alone."""
        return update_with_keys({key for tensors in self.layers.values() for key in tensors})


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
        tensors = {_PREFIX + name: tensor for name, tensor in full_tensors(model).items()}
    if directory is None:
        return
    settings |= {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": getattr(getattr(model, "config", None), "name_or_path", None) or None,
        "inference_mode": True,
    }
    metadata = {"format": "pt"}
    if fingerprint := base_fingerprint(model):
        metadata[_FINGERPRINT] = fingerprint
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


def read_saved(directory: Path) -> SavedAdapter:
    """Read an adapter folder.

    Raises: InputError: files missing, a kind or a setting that is not supported, values that are not finite.
        CheckpointError: the weights file is truncated or corrupt.
    """
    settings = _read_settings(directory)
    tensors, metadata = _read_weights(directory)
    refuse_non_finite(tensors, str(directory / WEIGHTS_FILE))
    layers: dict[str, dict[str, torch.Tensor]] = {}
    others: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        part = next((p for p in _PARTS if key.endswith("." + p)), None)
        if part is None or not key.startswith(_PREFIX):
            others[key] = tensor
        else:
            layers.setdefault(key.removeprefix(_PREFIX).removesuffix("." + part), {})[part] = tensor
    return SavedAdapter(directory, settings, layers, others, metadata.get(_FINGERPRINT))


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
    config = _adapter_config(model, saved)
    _check_shapes(model, saved, config)
    kind = UPDATES[config.type]
    return inject(model, config, seed=0 if kind is None else kind.seed_from_peft(saved.settings))


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
                assign_full(getattr(layer.update, attribute), tensors[key], layer.update.storage)
            layer.update.load_extra(tensors, saved.settings, layer.base)
            rest_OI = layer.update.residual(layer.base)
            if rest_OI is not None:
                layer.replace_base(rest_OI)
        if layer.magnitude is not None:
            layer.magnitude.load(tensors[_MAGNITUDE])
    for key, (name, leaf) in vocabulary_copies(model, saved.others, _PREFIX).items():
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


def _adapter_tensors(layers: Mapping[str, AdaptedLinear]) -> dict[str, torch.Tensor]:
    """The tensors of an adapter under PEFT's names; m in float32, the others in their own dtype."""
    tensors: dict[str, torch.Tensor] = {}
    updates = {name: layer.update for name, layer in layers.items() if layer.update is not None}
    for name, layer in layers.items():
        if (update := updates.get(name)) is not None:
            own = {k: full_tensor(getattr(update, a), update.storage) for a, k in update.peft_keys.items()}
            tensors |= {f"{_PREFIX}{name}.{k}": t for k, t in (own | update.extra_tensors()).items()}
        if layer.magnitude is not None:
            tensors[f"{_PREFIX}{name}.{_MAGNITUDE}"] = layer.magnitude.value().float()
    if updates:
        tensors |= type(next(iter(updates.values()))).shared_tensors(updates)
    return {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}


def _adapter_config(model: nn.Module, saved: SavedAdapter) -> AdapterConfig:
    """The configuration whose injection makes the layers that the file's tensors belong to."""
    settings, path = saved.settings, saved.directory
    copies = vocabulary_copies(model, saved.others, _PREFIX)
    for key, (name, _) in copies.items():
        refuse_other_vocabulary(model, name, saved.others[key].shape[0], str(path))
    known = {*copies, *(key for kind in _KINDS for key in kind.shared_keys)}
    strangers = [key for key in saved.others if key not in known]
    if strangers:
        raise InputError(f"{path / WEIGHTS_FILE}: tensor {strangers[0]!r} is not part of a supported adapter")
    layers = linear_layers(model)
    missing = [name for name in saved.layers if name not in dict(model.named_modules())]
    if missing or not saved.layers:
        raise InputError(
            f"{path}: the adapter was made for another base: the model has no layer "
            f"{', '.join(missing[:3]) or '(the adapter is empty)'}"
        )
    unfit = [name for name in saved.layers if name not in layers]
    if unfit:
        raise InputError(f"{path}: the adapter was made for another base: {unfit[0]} is no linear layer")
    _check_parts(saved)
    updates = [name for name, parts in saved.layers.items() if parts.keys() - {_MAGNITUDE}]
    magnitudes = [name for name, parts in saved.layers.items() if _MAGNITUDE in parts]
    kind = saved.kind_of_tensors
    of_updates = [t for parts in saved.layers.values() for key, t in parts.items() if key != _MAGNITUDE]
    try:
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


def _format_of(layer: Linear) -> str:
    if isinstance(layer, AdaptedLinear):
        return layer.base.quantization
    return "none" if layer.weight.is_floating_point() else type(layer).__name__


def _check_parts(saved: SavedAdapter) -> None:
    """A half adapter is refused: a layer with one factor, or one without the magnitude of the others."""
    everywhere = set() if saved.kind is None else set(saved.kind.peft_keys.values())
    own = set() if saved.kind_of_tensors is None else set(saved.kind_of_tensors.peft_keys.values())
    # A variant that shares keys with the file's own is not in it.
    of_kinds = [keys for kind in _KINDS if (keys := set(kind.peft_keys.values())) == own or not keys & own]
    groups = [*of_kinds, *(set(kind.extra_keys) for kind in _KINDS)]
    if saved.kind is not None and saved.kind.peft_magnitude and saved.settings.get("use_dora"):
        everywhere.add(_MAGNITUDE)
    for name, tensors in saved.layers.items():
        wanted = set(everywhere)
        for group in groups:
            wanted |= group if group & tensors.keys() else set()
        lacking = sorted(wanted - tensors.keys())
        if lacking:
            raise CheckpointError(f"{saved.directory / WEIGHTS_FILE}: {name} lacks {', '.join(lacking)}")


def _check_shapes(model: nn.Module, saved: SavedAdapter, config: AdapterConfig) -> None:
    layers = linear_layers(model)
    for name, tensors in saved.layers.items():
        layer, r = layers[name], layer_config(config, name).r
        shape = (layer.out_features, layer.in_features)
        expected = {
            _MAGNITUDE: shape[:1],
            **{k: v for kind in _KINDS for k, v in kind.saved_shapes(shape, r).items()},
        }
        for part, tensor in tensors.items():
            if tuple(tensor.shape) != expected[part]:
                if expected[part][0] == shape[0]:
                    refuse_other_vocabulary(model, name, tensor.shape[0], str(saved.directory))
                raise InputError(
                    f"{saved.directory}: the adapter was made for another base or rank: {name}.{part} has "
                    f"shape {tuple(tensor.shape)}, expected {expected[part]}"
                )


def _read_settings(directory: Path) -> dict[str, Any]:
    if not directory.is_dir():
        raise InputError(f"{directory}: no such adapter folder")
    path = directory / CONFIG_FILE
    below = sorted(found.parent.name for found in directory.glob(f"*/{CONFIG_FILE}"))
    if below and not path.is_file():
        named = ", ".join(f"{name}/" for name in below)
        raise InputError(f"{path}: no such file; {directory} holds adapters, name one of them: {named}")
    settings: dict[str, Any] = read_json(path)
    allowed = (*(kind.peft_type for kind in _KINDS), OWN_TYPE)
    kind = settings.get("peft_type") if isinstance(settings, dict) else type(settings).__name__
    if kind not in allowed:
        raise InputError(f"{path}: peft_type is {kind!r}; allowed: {', '.join(map(repr, allowed))}")
    if kind == OWN_TYPE:
        if "qdora_method" in settings:  # of versions before 0.2
            settings["adapter_type"] = _former_type(str(settings["qdora_method"]))
        named = str(settings.get("adapter_type"))
        if named not in (*UPDATES, FULL):
            raise InputError(f"{path}: unknown adapter_type {named!r}; {suggest(named, [*UPDATES, FULL])}")
    try:
        refuse_unsupported(settings)
        for variant in _KINDS:
            if variant.peft_type == kind:
                variant.derives_base(settings)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    return settings


def _former_type(method: str) -> UpdateType | str:
    if method in ("full", "full-nf4"):
        return FULL
    return {"magnitude": "none", "dvora": "vera"}.get(method.removeprefix("q"), "lora")


def _read_weights(directory: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    path = directory / WEIGHTS_FILE
    if not path.is_file():
        pickled = (directory / "adapter_model.bin").exists()
        why = "only adapter_model.bin is there, and no pickle is ever loaded" if pickled else "no such file"
        raise InputError(f"{path}: {why}")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: truncated or corrupt: {error}") from None
