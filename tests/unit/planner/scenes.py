"""Small runs to estimate."""

from __future__ import annotations

from typing import Any

import torch

from qdora.config import AdapterConfig, TrainingConfig
from qdora.distributed.launch import FsdpSettings
from qdora.models.build import Quantization
from qdora.planner.simulate import Architecture, Launch
from tests.tiny import tiny_config

HIDDEN, INTERMEDIATE, KEYS, VOCABULARY, R = 64, 96, 32, 301, 8
"""Sides of the layers; 301 divides by no number of processes."""


def architecture(
    layers: int = 2, *, tied: bool = False, quantized: bool = True, **changes: Any
) -> Architecture:
    config = tiny_config(num_hidden_layers=layers, vocab_size=VOCABULARY, tie_word_embeddings=tied, **changes)
    quantization = Quantization() if quantized else None
    return Architecture(config, torch.bfloat16, torch.bfloat16, quantization)


def launch(
    processes: int = 1,
    *,
    sequences: int = 2,
    accumulation: int = 1,
    length: int = 16,
    checkpointing: bool = False,
    sharded: bool | None = None,
    adapter: dict[str, Any] | None = None,
    **fsdp: Any,
) -> Launch:
    """One sequence length for all; sharded wherever there are several processes."""
    training = TrainingConfig(
        max_steps=1,
        batch_size=sequences * accumulation * processes,
        gradient_accumulation=accumulation,
        gradient_checkpointing=checkpointing,
    )
    sharded = processes > 1 if sharded is None else sharded
    return Launch(
        adapter=AdapterConfig(**({"r": R} | (adapter or {}))),
        training=training,
        max_length=length,
        world_size=processes,
        fsdp=FsdpSettings(**fsdp) if sharded else None,
    )
