"""A launch of many processes with GPUs, of which there is only rank 0 and no GPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import masking_utils

from qdora.parallel.launch_settings import FsdpSettings
from qdora.parallel.processes import Processes
from qdora.quant.weight import TILE_BYTES

CPU = torch.device("cpu")
"""Where every fake tensor is, also one that stands for a GPU's: autograd asks for a real device."""


@contextmanager
def fake_processes(count: int, fsdp: FsdpSettings | None, device: str) -> Iterator[Processes]:
    """Rank 0, whose share is the largest; its collectives return at once.

    Args:
        device: `cuda` or `cpu`, whose tile sizes and copies to suppose.
    """
    assert not dist.is_initialized(), "an estimate is made by a process alone"
    with ExitStack() as stack:
        stack.callback(setattr, sys, "excepthook", sys.excepthook)  # torch puts its own around it
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
        stack.callback(dist.destroy_process_group)
        stack.enter_context(_tiles_of(device))
        stack.enter_context(_no_tracing())
        if fsdp is not None and fsdp.offload and device != "cpu":
            stack.enter_context(_copies_of_shards())
        accelerator = SimpleNamespace(
            process_index=0,
            num_processes=count,
            device=CPU,
            is_main_process=True,
            reduce=_sum_of_copy,
        )
        yield Processes(accelerator, fsdp)


def _sum_of_copy(tensor: torch.Tensor, reduction: str) -> torch.Tensor:
    """As accelerate's `reduce`, which needs a launch."""
    copy = tensor.clone()
    dist.all_reduce(copy)
    return copy


def _tiles_of(device: str) -> AbstractContextManager[object]:
    return mock.patch.dict(TILE_BYTES, {"cpu": TILE_BYTES[device]})


def _no_tracing() -> AbstractContextManager[object]:
    """Transformers takes fake tensors for the tracing of a graph, and would make a mask of T x T for it."""
    return mock.patch.object(masking_utils, "is_tracing", return_value=False)


def _copies_of_shards() -> AbstractContextManager[object]:
    """An offloaded shard is copied to the GPU before it is gathered; here it is on the same device."""
    original: Any = vars(FSDPParam)["all_gather_inputs"]
    copies = property(lambda parameter: [shard.clone() for shard in original.fget(parameter)])
    return mock.patch.object(FSDPParam, "all_gather_inputs", copies)
