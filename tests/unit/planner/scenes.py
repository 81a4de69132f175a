"""Small runs to estimate."""

from __future__ import annotations

from typing import Any

import torch

from qdora.config import AdapterConfig, QuantizationName, TrainingConfig
from qdora.distributed.launch import FsdpSettings
from qdora.planner.architecture import Architecture
from qdora.planner.simulate import Launch
from qdora.quant import Quantization
from tests.tiny import tiny_config

HIDDEN, INTERMEDIATE, KEYS, VOCABULARY, R = 64, 96, 32, 301, 8
"""Sides of the layers; 301 divides by no number of ranks."""


def architecture(
    layers: int = 2, *, tied: bool = False, quantization: QuantizationName = "nf4", **changes: Any
) -> Architecture:
    config = tiny_config(num_hidden_layers=layers, vocab_size=VOCABULARY, tie_word_embeddings=tied, **changes)
    return Architecture(config, torch.bfloat16, torch.bfloat16, Quantization(quantization))


def launch(
    world_size: int = 1,
    *,
    sequences: int = 2,
    accumulation: int = 1,
    length: int = 16,
    checkpointing: bool = False,
    sharded: bool | None = None,
    adapter: dict[str, Any] | None = None,
    full: bool = False,
    **fsdp: Any,
) -> Launch:
    """One sequence length for all; sharded wherever there are several ranks."""
    training = TrainingConfig(
        mode="full" if full else "adapter",
        max_steps=1,
        batch_size=sequences * accumulation * world_size,
        gradient_accumulation=accumulation,
        gradient_checkpointing=checkpointing,
    )
    sharded = world_size > 1 if sharded is None else sharded
    return Launch(
        adapter=AdapterConfig(**({"type": "none", "dora": False} if full else {"r": R} | (adapter or {}))),
        training=training,
        max_length=length,
        world_size=world_size,
        fsdp=FsdpSettings(**fsdp) if sharded else None,
    )
