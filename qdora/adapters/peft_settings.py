"""PEFT's settings of an adapter, from adapted layers and back to a configuration."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qdora.adapters.direction import D_INITIAL, LowRank, SharedPair, Vera
from qdora.adapters.inject import linear_layers
from qdora.adapters.linear import AdaptedLinear
from qdora.adapters.methods import METHODS
from qdora.adapters.peft_layout import CONFIG_FILE, OWN_TYPE, PAIR_NAMES, WEIGHTS_FILE, SavedAdapter
from qdora.config import AdapterConfig, Method
from qdora.errors import CheckpointError, InputError
from qdora.quant.nf4 import NF4Weight


def peft_settings(layers: Mapping[str, AdaptedLinear]) -> dict[str, Any]:
    """What PEFT needs to know, or what we do where PEFT has no such method."""
    directions = {name: layer.direction for name, layer in layers.items() if layer.direction is not None}
    magnitudes = {name for name, layer in layers.items() if layer.magnitude is not None}
    pair = shared_pair(layers)
    settings: dict[str, Any] = {"target_modules": sorted(directions), "bias": "none", "fan_in_fan_out": False}
    if pair is not None:
        settings |= {
            "peft_type": "VERA",
            "r": pair.a_RI.shape[0],
            "projection_prng_key": pair.seed or 0,
            "save_projection": pair.seed is None,
            "vera_dropout": next(iter(directions.values())).dropout,
            "d_initial": D_INITIAL,
        }
    else:
        settings |= {"peft_type": "LORA", "use_dora": bool(magnitudes), **_lora_settings(directions)}
    if (pair is not None and magnitudes) or (magnitudes and magnitudes != directions.keys()):
        settings |= {
            "peft_type": OWN_TYPE,
            "qdora_method": _method(layers),
            "magnitude_modules": sorted(magnitudes),
        }
    return settings


def _lora_settings(directions: Mapping[str, LowRank | Vera]) -> dict[str, Any]:
    """Rank, alpha and their exceptions.  Alpha is that of alpha / r, whatever the scale came from."""
    if not directions:
        return {}
    ranks = {name: direction.r for name, direction in directions.items()}
    alphas = {name: _whole(direction.scale * direction.r) for name, direction in directions.items()}
    r, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {name: value for name, value in ranks.items() if value != r},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
        "lora_dropout": next(iter(directions.values())).dropout,
        "use_rslora": False,
        "init_lora_weights": True,
    }


def _whole(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value


def _method(layers: Mapping[str, AdaptedLinear]) -> Method:
    """The row of the method table that fits all these layers together."""
    quantized = any(isinstance(layer.base, NF4Weight) for layer in layers.values())
    directions = [layer.direction for layer in layers.values() if layer.direction is not None]
    kind = None if not directions else "vera" if isinstance(directions[0], Vera) else "lora"
    return _method_of(quantized, kind, any(layer.magnitude is not None for layer in layers.values()))


def _method_of(quantized: bool, direction: str | None, magnitude: bool) -> Method:
    axes = ("nf4" if quantized else "dense", direction, magnitude)
    return next(
        name
        for name, spec in METHODS.items()
        if not spec.trains_base and (spec.base, spec.direction, spec.magnitude) == axes
    )


def adapter_config(model: nn.Module, saved: SavedAdapter) -> AdapterConfig:
    """The configuration whose injection makes the layers that the file fills."""
    settings, path = saved.settings, saved.directory
    strangers = [key for key in saved.others if key not in PAIR_NAMES.values()]
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
    parts = {name: set(tensors) for name, tensors in saved.layers.items()}
    directions = [name for name in parts if parts[name] - {"lora_magnitude_vector"}]
    magnitudes = [name for name in parts if "lora_magnitude_vector" in parts[name]]
    kind = None
    if directions:
        kind = "vera" if "vera_lambda_d" in parts[directions[0]] else "lora"
    quantized = isinstance(getattr(layers[next(iter(parts))], "base", None), NF4Weight)
    half = all(
        tensor.dtype == torch.bfloat16
        for tensors in saved.layers.values()
        for part, tensor in tensors.items()
        if part != "lora_magnitude_vector"
    )
    own: dict[str, Any] = {}
    try:
        if kind == "lora":
            own = _ranks(settings, directions)
        elif kind == "vera":
            own = {"r": int(settings["r"])}
        return AdapterConfig(
            method=_method_of(quantized, kind, bool(magnitudes)),
            targets=tuple(directions or magnitudes),
            magnitude_targets=tuple(magnitudes) or None,
            dropout=float(settings.get("lora_dropout", settings.get("vera_dropout", 0.0))),
            dtype="bfloat16" if half else "float32",
            **own,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path / CONFIG_FILE}: {error}") from None


def _ranks(settings: Mapping[str, Any], directions: list[str]) -> dict[str, Any]:
    """Rank and alpha of each layer, PEFT's patterns resolved to full names."""
    r, alpha = int(settings["r"]), float(settings["lora_alpha"])
    ranks = {name: int(_by_pattern(settings.get("rank_pattern"), name, r)) for name in directions}
    alphas = {name: float(_by_pattern(settings.get("alpha_pattern"), name, alpha)) for name in directions}
    return {
        "r": r,
        "alpha": alpha,
        "rslora": bool(settings.get("use_rslora", False)),
        "rank_pattern": {name: value for name, value in ranks.items() if value != r},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
    }


def _by_pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """PEFT's rule: the first key that, as a regular expression, matches the name or its dotted end."""
    for key, value in (patterns or {}).items():
        try:
            if re.match(rf"(.*\.)?({key})$", name):
                return value
        except re.error as error:
            raise ValueError(f"pattern {key!r} is no regular expression: {error}") from None
    return default


def _check_parts(saved: SavedAdapter) -> None:
    """A half adapter is refused: a layer with one factor, or one without the magnitude of the others."""
    settings = saved.settings
    everywhere = (
        {"lora_magnitude_vector"} if settings["peft_type"] == "LORA" and settings.get("use_dora") else set()
    )
    groups = {"LORA": {"lora_A.weight", "lora_B.weight"}, "VERA": {"vera_lambda_d", "vera_lambda_b"}}
    everywhere = set(groups.get(settings["peft_type"], ()))
    if settings["peft_type"] == "LORA" and settings.get("use_dora"):
        everywhere.add("lora_magnitude_vector")
    for name, tensors in saved.layers.items():
        wanted = set(everywhere)
        for group in groups.values():
            wanted |= group if group & tensors.keys() else set()
        lacking = sorted(wanted - tensors.keys())
        if lacking:
            raise CheckpointError(f"{saved.directory / WEIGHTS_FILE}: {name} lacks {', '.join(lacking)}")


def shared_pair(layers: Mapping[str, AdaptedLinear]) -> SharedPair | None:
    return next((d.pair for layer in layers.values() if isinstance(d := layer.direction, Vera)), None)
