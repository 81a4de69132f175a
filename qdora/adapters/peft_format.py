"""Adapters on disk in PEFT's layout: adapter_config.json and adapter_model.safetensors.

PEFT reads what is written here and the other way round.  The magnitude is stored whole,
m and not its offset.  The base's fingerprint stands in the safetensors metadata, where
PEFT does not look.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from qdora.adapters.fingerprint import base_fingerprint
from qdora.adapters.inject import InjectionReport, adapted_layers, inject
from qdora.adapters.linear import AdaptedLinear
from qdora.config import AdapterConfig, Method
from qdora.errors import CheckpointError, InputError
from qdora.files import read_json, write_file, write_json
from qdora.quant.nf4 import NF4Weight

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
FINGERPRINT_KEY = "qdora_base_fingerprint"

# PEFT settings that change the computation and have no counterpart here, with their neutral values.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layer_replication": (None,),
    "lora_bias": (False,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "use_qalora": (False, None),
    "alora_invocation_tokens": (None,),
    "use_bdlora": (None, False),
}


def check_savable(model: nn.Module) -> None:
    """Find out before training, not after it, that an adapter does not fit the format.

    Raises: InputError: as `save_adapter`, for what does not depend on the folder.
    """
    layers = adapted_layers(model)
    if not layers:
        raise InputError("the model has no adapter to save")
    _peft_config(model, layers)


def save_adapter(model: nn.Module, directory: str | Path) -> None:
    """Write a model's adapter in PEFT's format, each file whole or not at all.

    Args:
        model: as `inject` or `load_adapter` left it.
    Raises: InputError: the model has no adapter, its layers disagree on their settings,
        or the folder cannot be written.
    """
    check_savable(model)
    layers = adapted_layers(model)
    config = _peft_config(model, layers)
    metadata = {"format": "pt"}
    fingerprint = base_fingerprint(model)
    if fingerprint:
        metadata[FINGERPRINT_KEY] = fingerprint
    tensors = adapter_tensors(layers)
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
    directory = Path(directory)
    settings = _read_settings(directory)
    tensors, metadata = _read_weights(directory)
    made_for, present = metadata.get(FINGERPRINT_KEY), base_fingerprint(model)
    if made_for and present and made_for != present:
        raise InputError(
            f"{directory}: the adapter was made for another base: its fingerprint is {made_for[:16]}…, "
            f"the loaded model's is {present[:16]}…"
        )
    config = _adapter_config(model, directory, settings, tensors)
    _check_shapes(model, directory, tensors, config.r)
    report = inject(model, config)
    with torch.no_grad():
        for name, layer in adapted_layers(model).items():
            _fill(layer, tensors, PREFIX + name)
    return report


def adapter_tensors(layers: dict[str, AdaptedLinear]) -> dict[str, torch.Tensor]:
    """The tensors of an adapter under PEFT's names; A and B in their own dtype, m in float32."""
    tensors: dict[str, torch.Tensor] = {}
    for name, layer in layers.items():
        if layer.direction is not None:
            tensors[f"{PREFIX}{name}.lora_A.weight"] = _stored(layer.direction.a_RI)
            tensors[f"{PREFIX}{name}.lora_B.weight"] = _stored(layer.direction.b_OR)
        if layer.magnitude is not None:
            tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = _stored(layer.magnitude.value().float())
    return tensors


def _stored(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous()


def _peft_config(model: nn.Module, layers: dict[str, AdaptedLinear]) -> dict[str, Any]:
    directions = {name: layer.direction for name, layer in layers.items() if layer.direction is not None}
    settings = {(d.r, d.scale, d.dropout) for d in directions.values()}
    if len(settings) != 1:
        raise InputError("PEFT's format holds one rank, scale and dropout; these layers have several or none")
    [(r, scale, dropout)] = settings
    magnitudes = {name for name, layer in layers.items() if layer.magnitude is not None}
    if magnitudes and magnitudes != directions.keys():
        raise InputError(
            "PEFT's format has a magnitude on every adapted layer or on none; "
            "adapter.magnitude_targets names other layers than adapter.targets"
        )
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": getattr(getattr(model, "config", None), "name_or_path", None) or None,
        "r": r,
        "lora_alpha": int(alpha) if (alpha := scale * r).is_integer() else alpha,
        "lora_dropout": dropout,
        "use_dora": bool(magnitudes),
        "use_rslora": False,
        "target_modules": sorted(directions),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }


def _read_settings(directory: Path) -> dict[str, Any]:
    if not directory.is_dir():
        raise InputError(f"{directory}: no such adapter folder")
    settings = read_json(directory / CONFIG_FILE)
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        kind = settings.get("peft_type") if isinstance(settings, dict) else type(settings).__name__
        raise InputError(f"{directory / CONFIG_FILE}: peft_type is {kind!r}; allowed: 'LORA'")
    for key, neutral in _NEUTRAL.items():
        if key in settings and settings[key] not in neutral:
            raise InputError(
                f"{directory / CONFIG_FILE}: {key} = {settings[key]!r} is not supported; "
                f"allowed: {neutral[0]!r}"
            )
    return settings


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


def _adapter_config(
    model: nn.Module, directory: Path, settings: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> AdapterConfig:
    names = sorted({_layer_name(directory, key) for key in tensors})
    layers = dict(model.named_modules())
    strangers = [name for name in names if name not in layers]
    if strangers or not names:
        raise InputError(
            f"{directory}: the adapter was made for another base: the model has no layer "
            f"{', '.join(strangers[:3]) or '(the adapter is empty)'}"
        )
    quantized = isinstance(getattr(layers[names[0]], "base", None), NF4Weight)
    methods: dict[tuple[bool, bool], Method] = {
        (True, True): "qdora",
        (True, False): "qlora",
        (False, True): "dora",
        (False, False): "lora",
    }
    use_dora = bool(settings.get("use_dora", False))
    wanted = {"lora_A.weight", "lora_B.weight"} | ({"lora_magnitude_vector"} if use_dora else set())
    for name in names:
        missing = [part for part in sorted(wanted) if f"{PREFIX}{name}.{part}" not in tensors]
        if missing:
            raise CheckpointError(f"{directory / WEIGHTS_FILE}: {name} lacks {', '.join(missing)}")
    half = all(t.dtype == torch.bfloat16 for key, t in tensors.items() if ".lora_A." in key)
    try:
        return AdapterConfig(
            method=methods[quantized, use_dora],
            r=int(settings["r"]),
            alpha=float(settings["lora_alpha"]),
            dropout=float(settings.get("lora_dropout", 0.0)),
            rslora=bool(settings.get("use_rslora", False)),
            targets=tuple(names),
            dtype="bfloat16" if half else "float32",
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{directory / CONFIG_FILE}: {error}") from None


def _layer_name(directory: Path, key: str) -> str:
    for part in (".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"):
        if key.startswith(PREFIX) and key.endswith(part):
            return key.removeprefix(PREFIX).removesuffix(part)
    raise InputError(f"{directory / WEIGHTS_FILE}: tensor {key!r} is not part of a LoRA or DoRA adapter")


def _check_shapes(model: nn.Module, directory: Path, tensors: dict[str, torch.Tensor], r: int) -> None:
    for key, tensor in tensors.items():
        name = _layer_name(directory, key)
        layer = model.get_submodule(name)
        if not isinstance(layer, (nn.Linear, AdaptedLinear)):
            raise InputError(f"{directory}: the adapter was made for another base: {name} is no linear layer")
        expected = {
            ".lora_A.weight": (r, layer.in_features),
            ".lora_B.weight": (layer.out_features, r),
            ".lora_magnitude_vector": (layer.out_features,),
        }[key.removeprefix(PREFIX + name)]
        if tuple(tensor.shape) != expected:
            raise InputError(
                f"{directory}: the adapter was made for another base or rank: {key} has shape "
                f"{tuple(tensor.shape)}, expected {expected}"
            )


def _fill(layer: AdaptedLinear, tensors: dict[str, torch.Tensor], prefix: str) -> None:
    if layer.direction is not None:
        layer.direction.a_RI.copy_(tensors[f"{prefix}.lora_A.weight"])
        layer.direction.b_OR.copy_(tensors[f"{prefix}.lora_B.weight"])
    if layer.magnitude is not None:
        layer.magnitude.load(tensors[f"{prefix}.lora_magnitude_vector"])
