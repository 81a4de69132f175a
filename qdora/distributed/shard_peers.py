"""The processes of a run, as loading sees them: each fills in its share of a sharded model."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist

from qdora.distributed.context import DistributedContext
from qdora.quant.share import Share


class ShardPeers:
    """All ranks of a sharded run, in the order of their shards.

    Args:
        processes: of a launch with FSDP.
    """

    def __init__(self, context: DistributedContext) -> None:
        assert context.mesh is not None
        assert context.fsdp is not None
        self._processes, self._group = context, context.mesh.get_group()
        self.share = Share(context.mesh.get_local_rank(), context.mesh.size())
        self.storage = torch.device("cpu") if context.fsdp.offload else None

    def gather_rows(self, own: torch.Tensor, size: int) -> torch.Tensor:
        """(size, ...) everybody's rows, each giving those of its share."""
        step = -(-size // self.share.count)
        padded = own.new_zeros(step, *own.shape[1:])
        padded[: own.shape[0]] = own
        everybodys = own.new_empty(step * self.share.count, *own.shape[1:])
        dist.all_gather_single(everybodys, padded, group=self._group)
        return everybodys[:size]

    def gather(self, items: list[Any]) -> list[Any]:
        """Everybody's items, in order of rank."""
        return self._processes.gather(items)

    def together(self) -> AbstractContextManager[None]:
        """A block after which an error of one process has ended it on all."""
        return self._processes.raise_on_all_ranks()
