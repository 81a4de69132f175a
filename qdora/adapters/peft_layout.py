"""PEFT's layout on disk, read without a model: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from qdora.adapters.methods import METHODS
from qdora.errors import CheckpointError, InputError, suggest
from qdora.files import read_json

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
PAIR_NAMES = {"a_RI": "base_model.vera_A", "b_OR": "base_model.vera_B"}
FINGERPRINT_KEY = "qdora_base_fingerprint"
OWN_TYPE = "QDORA"
"""peft_type of the methods that PEFT lacks; `qdora_method` names which."""

# PEFT settings that change the computation and have no counterpart here, with their neutral values.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "modules_to_save": (None, []),
    "layer_replication": (None,),
    "lora_bias": (False,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "use_qalora": (False, None),
    "alora_invocation_tokens": (None,),
    "use_bdlora": (None, False),
}

PARTS = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector", "vera_lambda_d", "vera_lambda_b")
"""What a layer's tensors are called after its name."""


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter as it was read, before it meets a model.

    Attributes:
        settings: adapter_config.json.
        layers: tensors of each layer by part.
        others: tensors that belong to no layer's adapter.
    """

    directory: Path
    settings: dict[str, Any]
    layers: dict[str, dict[str, torch.Tensor]]
    others: dict[str, torch.Tensor]
    fingerprint: str | None


def read_saved(directory: Path) -> SavedAdapter:
    """Read an adapter folder.

    Raises: InputError: files missing, a kind or a setting that is not supported.
        CheckpointError: the weights file is truncated or corrupt.
    """
    settings = _read_settings(directory)
    tensors, metadata = _read_weights(directory)
    layers: dict[str, dict[str, torch.Tensor]] = {}
    others: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        part = next((p for p in PARTS if key.endswith("." + p)), None)
        if part is None or not key.startswith(PREFIX):
            others[key] = tensor
        else:
            layers.setdefault(key.removeprefix(PREFIX).removesuffix("." + part), {})[part] = tensor
    return SavedAdapter(directory, settings, layers, others, metadata.get(FINGERPRINT_KEY))


def _read_settings(directory: Path) -> dict[str, Any]:
    if not directory.is_dir():
        raise InputError(f"{directory}: no such adapter folder")
    path = directory / CONFIG_FILE
    settings: dict[str, Any] = read_json(path)
    allowed = ("LORA", "VERA", OWN_TYPE)
    kind = settings.get("peft_type") if isinstance(settings, dict) else type(settings).__name__
    if kind not in allowed:
        raise InputError(f"{path}: peft_type is {kind!r}; allowed: {', '.join(map(repr, allowed))}")
    if kind == OWN_TYPE and (named := settings.get("qdora_method")) not in METHODS:
        raise InputError(f"{path}: unknown qdora_method {named!r}; {suggest(str(named), METHODS)}")
    for key, neutral in _NEUTRAL.items():
        if key in settings and settings[key] not in neutral:
            raise InputError(f"{path}: {key} = {settings[key]!r} is not supported; allowed: {neutral[0]!r}")
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
