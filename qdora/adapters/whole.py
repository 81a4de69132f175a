"""Adapter parameters as one process stores them, whether they are whole or sharded.

Under FSDP a trained parameter is a float32 shard, the optimizer's master; what computes, and what is
saved, is its rounding to the storage dtype.
"""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor

from qdora.quant.share import Share


def whole(parameter: torch.Tensor, storage: torch.dtype) -> torch.Tensor:
    """All rows in the storage dtype; of a sharded parameter every process must ask at the same time."""
    stored = parameter.detach()
    if isinstance(stored, DTensor):
        stored = stored.full_tensor()
    return stored.to(storage)


@torch.no_grad()
def put(parameter: torch.Tensor, value: torch.Tensor, storage: torch.dtype) -> None:
    """Write a whole value, rounded to the storage dtype, into a parameter or into this process's shard.

    Args:
        value: shape of the whole parameter, any dtype and device.
    """
    rounded = value.to(storage)
    if isinstance(parameter, DTensor):
        parameter.to_local().copy_(own_rows(parameter, rounded))
        torch.autograd.graph.increment_version(parameter)
    else:
        parameter.copy_(rounded)


def own_rows(parameter: DTensor, value: torch.Tensor) -> torch.Tensor:
    """The rows of a whole value that belong to this process's shard."""
    mesh = parameter.device_mesh
    return value[Share(mesh.get_local_rank(), mesh.size()).rows(value.shape[0])]
