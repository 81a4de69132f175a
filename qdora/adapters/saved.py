"""An adapter folder in PEFT's layout as it was read, before it meets a model."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from qdora.adapters import UPDATES, update_with_keys
from qdora.adapters.base import LowRankUpdate, refuse_non_finite
from qdora.adapters.init import init_from_peft
from qdora.adapters.peft_settings import refuse_unsupported
from qdora.config import InitName, UpdateType
from qdora.errors import CheckpointError, InputError, suggest
from qdora.files import read_json

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
OWN_TYPE = "QDORA"
"""peft_type of the adapters that PEFT lacks; `adapter_type` and `dora` say which."""
FULL = "full"
"""adapter_type of a fully trained model."""

PREFIX = "base_model.model."
FINGERPRINT = "qdora_base_fingerprint"
MAGNITUDE = "lora_magnitude_vector"
KINDS = [kind for kind in UPDATES.values() if kind is not None]
_PARTS = (*(key for kind in KINDS for key in (*kind.peft_keys.values(), *kind.extra_keys)), MAGNITUDE)


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
        return {key.removeprefix(PREFIX): tensor for key, tensor in self.others.items()}

    @property
    def changes_base(self) -> bool:
        """Whether the base weights have to be changed when it is loaded."""
        extra = {key for kind in KINDS for key in kind.extra_keys}
        derived = self.kind is not None and self.kind.derives_base(self.settings)
        return derived or any(extra & tensors.keys() for tensors in self.layers.values())

    @property
    def has_tokens(self) -> bool:
        """Whether rows of the embedding were trained."""
        return bool(self.settings.get("trainable_token_indices"))

    @property
    def init(self) -> InitName:
        """How A and B started; `kaiming` of an adapter without such factors."""
        return init_from_peft(self.settings.get("init_lora_weights", True))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all tensors, by their names."""
        layers = {f"{n}.{part}": t for n, parts in self.layers.items() for part, t in parts.items()}
        digest = hashlib.sha256()
        for name, tensor in sorted((layers | self.others).items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @property
    def kind(self) -> type[LowRankUpdate] | None:
        """The variant of PEFT's name for it; None of a file that is ours alone."""
        return next((kind for kind in KINDS if kind.peft_type == self.settings["peft_type"]), None)

    @property
    def kind_of_tensors(self) -> type[LowRankUpdate] | None:
        """The variant that the layers' tensors belong to; None where there are magnitudes alone."""
        return update_with_keys({key for tensors in self.layers.values() for key in tensors})


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
        if part is None or not key.startswith(PREFIX):
            others[key] = tensor
        else:
            layers.setdefault(key.removeprefix(PREFIX).removesuffix("." + part), {})[part] = tensor
    return SavedAdapter(directory, settings, layers, others, metadata.get(FINGERPRINT))


def _read_settings(directory: Path) -> dict[str, Any]:
    if not directory.is_dir():
        raise InputError(f"{directory}: no such adapter folder")
    path = directory / CONFIG_FILE
    below = sorted(found.parent.name for found in directory.glob(f"*/{CONFIG_FILE}"))
    if below and not path.is_file():
        named = ", ".join(f"{name}/" for name in below)
        raise InputError(f"{path}: no such file; {directory} holds adapters, name one of them: {named}")
    settings: dict[str, Any] = read_json(path)
    allowed = (*(kind.peft_type for kind in KINDS), OWN_TYPE)
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
        for variant in KINDS:
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
