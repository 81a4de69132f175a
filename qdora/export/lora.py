"""`--format lora`: a plain LoRA for servers that refuse DoRA."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch.nn import functional as F

from qdora.adapters.lora import LoraUpdate
from qdora.adapters.saved import CONFIG_FILE, PREFIX, WEIGHTS_FILE
from qdora.files import write_json, write_tensors

ADAPTER = "adapter"
"""Folder of a LoRA that stands beside weights."""


def write_lora(
    directory: Path,
    updates: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    *,
    base: str,
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Write a LoRA in PEFT's format, with one rank and a scale of 1, as servers take it.

    Args:
        directory: made where missing.
        updates: A (R, I) and B (O, R) by layer; a smaller rank is padded with zeros.
        base: what it goes onto.
        metadata: of the weights file.
    Returns: the rank.
    """
    r = max(a_RI.shape[0] for a_RI, _ in updates.values())
    settings = {
        "peft_type": LoraUpdate.peft_type,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": r,
        "lora_alpha": r,
        "lora_dropout": 0.0,
        "target_modules": sorted(updates),
        "use_dora": False,
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    a_key, b_key = LoraUpdate.peft_keys.values()
    tensors = {}
    for name, (a_RI, b_OR) in updates.items():
        missing = r - a_RI.shape[0]
        tensors[f"{PREFIX}{name}.{a_key}"] = F.pad(a_RI, (0, 0, 0, missing)).contiguous()
        tensors[f"{PREFIX}{name}.{b_key}"] = F.pad(b_OR, (0, missing)).contiguous()
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / CONFIG_FILE, settings)
    write_tensors(directory / WEIGHTS_FILE, tensors, {"format": "pt", **(metadata or {})})
    return r
