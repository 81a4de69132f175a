"""The base model that a configuration names."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qdora.config import ModelConfig
from qdora.errors import InputError
from qdora.models.load import load_base


def load_configured(
    settings: ModelConfig, *, device: str | torch.device = "auto", progress: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """`load_base` with every setting of the `model` section.

    Raises: InputError: as `load_base`, or the model comes without a tokenizer.
    """
    model, tokenizer = load_base(
        settings.path,
        base=settings.base,
        dtype=settings.dtype,
        device=device,
        revision=settings.revision,
        block_size=settings.block_size,
        double_quantization=settings.double_quantization,
        progress=progress,
    )
    if tokenizer is None:
        raise InputError(f"{settings.path}: the model comes without a tokenizer")
    return model, tokenizer
