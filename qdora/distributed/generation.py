"""Generate with a sharded model: from a complete copy on every rank where it fits, else in step.

A token costs a pass through the model.  Gathered for each, it would cost a transfer of all weights as well,
and every rank would wait for the slowest answer.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import psutil
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from qdora.distributed.context import DistributedContext
from qdora.distributed.fsdp import sharded_modules

MARGIN = 0.8
"""Share of the free memory that a complete copy and its key-value cache may take."""


@contextmanager
def for_generation(model: PreTrainedModel, context: DistributedContext, tokens: int) -> Iterator[bool]:
    """Keep what a first pass gathers, where every rank has room for it, until the block ends.

    Args:
        tokens: prompts and answers that are in memory at one time, for the key-value cache.
    Yields: whether the processes must call the model equally often: it stays sharded.
    """
    if not isinstance(model, FSDPModule):
        yield False
        return
    needed = gathered_bytes(model) + tokens * cache_bytes(model)
    fits = all(context.gather([needed <= MARGIN * free_memory(context.device)]))
    settings = context.fsdp
    assert settings is not None
    groups = [group for group in sharded_modules(model) if group is not cast(FSDPModule, model)]
    for group in groups:
        group.set_reshard_after_forward(settings.reshard_after_forward and not fits, recurse=False)
    try:
        yield not fits
    finally:
        for group in groups:
            group.set_reshard_after_forward(settings.reshard_after_forward, recurse=False)
            group.reshard()
        model.reshard()


def gathered_bytes(model: nn.Module) -> int:
    """Bytes of all sharded parameters when they are whole."""
    return sum(p.numel() * p.dtype.itemsize for p in model.parameters() if isinstance(p, DTensor))


def cache_bytes(model: PreTrainedModel) -> int:
    """Bytes of one token's keys and values in all layers."""
    text = model.config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return int(2 * text.num_hidden_layers * heads * head * torch.float32.itemsize)


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take, its neighbours on the machine taking as much."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + unused)
    return int(psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
