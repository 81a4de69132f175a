"""The processes of a run, as loading sees them: each fills in its share of a sharded model."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist

from qdora.distributed.context import Processes, together
from qdora.quant.share import Share


class ShardPeers:
    """All ranks of a sharded run, in the order of their shards.

    Args:
        processes: of a launch with FSDP.
    """

    def __init__(self, processes: Processes) -> None:
        assert processes.mesh is not None
        assert processes.fsdp is not None
        self._processes, self._group = processes, processes.mesh.get_group()
        self.share = Share(processes.mesh.get_local_rank(), processes.mesh.size())
        self.storage = torch.device("cpu") if processes.fsdp.offload else None

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
        return together(self._processes)
