"""Tensors of a checkpoint in safetensors: each rank writes its local shards, any number of ranks reads them.

The layout is that of `torch.distributed.checkpoint`: a file's metadata holds the offset of each shard in its
full tensor.  torch plans and reads; its writer of safetensors would hold a second copy of everything.

Source: torch 2.13, `torch.distributed.checkpoint.hf_storage`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, create_default_local_save_plan
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.tensor import DTensor

from qdora.errors import CheckpointError
from qdora.files import file_digest, fsync, wrap_os_errors, write_tensors
from qdora.training.optimizer import local_shard

Shards = dict[str, tuple[torch.Tensor, list[int]]]
"""What one rank writes: tensors on the CPU by name, each with its offsets in the full tensor."""


def local_shards(tensors: Mapping[str, torch.Tensor], *, main: bool, full: bool, copy: bool) -> Shards:
    """The local shards of DTensors; on the main rank also the tensors that every rank holds in full.

    Args:
        full: gather the DTensors first, a collective; the main rank then writes all.
        copy: into memory of their own, for a write while the tensors change.
    """
    shards: Shards = {}
    for name, tensor in tensors.items():
        if full and isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        local = local_shard(tensor)
        if (main or isinstance(tensor, DTensor)) and local.numel():
            [item] = create_default_local_save_plan({name: tensor}, is_coordinator=main).items
            assert item.tensor_data is not None
            shards[name] = local.to("cpu", copy=copy).contiguous(), list(item.tensor_data.chunk.offsets)
    return shards


def write_shards(path: Path, shards: Shards) -> dict[str, str]:
    """Write one rank's file and fsync it; no file where there are no shards.

    Returns: SHA-256 by the file's name.
    Raises: InputError: the device is full, or the folder cannot be written.
    """
    if not shards:
        return {}
    sharding = {name: {"saved_offsets": offsets} for name, (_, offsets) in sorted(shards.items())}
    metadata = {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(sharding)}
    with wrap_os_errors(path):
        write_tensors(path, {name: tensor for name, (tensor, _) in shards.items()}, metadata)
        fsync(path)
        return {path.name: file_digest(path)}


class ShardReader:
    """Reads a checkpoint's tensors, from no file whose digest is not the recorded one.

    Args:
        folder: of the checkpoint.
        digests: SHA-256 of each file by its path in the folder.
    """

    def __init__(self, folder: Path, digests: Mapping[str, str]) -> None:
        self.folder, self.digests = folder, digests
        self._verified: set[str] = set()
        self._storage = HuggingFaceStorageReader(str(folder))

    def verify(self, name: str) -> None:
        """Compare a file with its digest, once.

        Raises: CheckpointError: they differ.
        """
        if name in self._verified:
            return
        if file_digest(self.folder / name) != self.digests[name]:
            raise CheckpointError(f"{self.folder / name}: corrupt, its SHA-256 is not the one recorded")
        self._verified.add(name)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the full tensors by name, from the headers of all files."""
        stored = self._metadata.state_dict_metadata
        return {name: tuple(t.size) for name, t in stored.items() if isinstance(t, TensorStorageMetadata)}

    def read(self, like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Read this rank's shards, each file verified first.

        Args:
            like: tensors of the stored names and shapes, left as they are; a DTensor's local shard is read.
        Returns: on the CPU, of a DTensor the local shard.
        Raises: CheckpointError: a file is not the one that was written.
        """
        self._storage.set_up_storage_reader(self._metadata, is_coordinator=False)
        planner = _ShardPlanner(like)
        planner.set_up_planner(dict(like), self._metadata)
        plan = planner.create_local_plan()
        for path in {self._storage.storage_data[item.storage_index].relative_path for item in plan.items}:
            self.verify(Path(path).name)
        self._storage.read_data(plan, planner).wait()
        return planner.targets

    @cached_property
    def _metadata(self) -> Metadata:
        return self._storage.read_metadata()


class _ShardPlanner(DefaultLoadPlanner):
    """Plans by the tensors that are there, and reads into others on the CPU."""

    def __init__(self, like: Mapping[str, torch.Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.targets = {name: torch.empty_like(local_shard(t), device="cpu") for name, t in like.items()}

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self.targets[index.fqn]
