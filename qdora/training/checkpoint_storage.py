"""Where torch.distributed.checkpoint puts a checkpoint's tensors: a safetensors file for each process.

Its own writer of safetensors holds a second copy of everything, knows no digests and nothing of a folder that
appears as a whole; its reader is used.  No pickle is written or read.

Source: torch 2.13, `torch.distributed.checkpoint.hf_storage`, whose files have the same layout.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from qdora.distributed.context import DistributedContext
from qdora.errors import CheckpointError, InputError
from qdora.files import file_digest, fsync, wrap_os_errors, write_tensors
from qdora.training.optimizer import local_rows


def save_tensors(
    tensors: Mapping[str, torch.Tensor],
    copies: Mapping[str, torch.Tensor] | None,
    folder: Path,
    context: DistributedContext,
    group: dist.ProcessGroup | None,
    put: Callable[[dict[str, str]], None],
) -> None:
    """Write each process's shards into `folder`; every process must call this.

    Args:
        tensors: DTensors of every process, whole tensors of one.
        copies: this process's data, where training goes on meanwhile; None for the tensors' own.
        group: in which the processes talk; None for the default one.
        put: called on the main process when all files are written, with their SHA-256.
    Raises: Exception: what went wrong here.
        InputError: what went wrong elsewhere.
    """
    _quiet()
    try:
        save(
            dict(tensors),
            storage_writer=_Writer(folder, put),
            planner=_Planner(copies),
            process_group=group,
            no_dist=context.world_size == 1,
        )
    except CheckpointException as error:
        raise _cause(error, context.rank) from None


def load_tensors(
    like: Mapping[str, torch.Tensor], reader: Reader, context: DistributedContext
) -> dict[str, torch.Tensor]:
    """Read this process's rows of each tensor; every process must call this.

    Args:
        like: tensors as they are needed; a DTensor's shard is what is read.
    Returns: on the CPU, of a DTensor the rows of this process.
    Raises: CheckpointError: a file that any of the processes reads is not what was written.
    """
    planner = _Loader(like)
    _quiet()
    try:
        load(dict(like), storage_reader=reader, planner=planner, no_dist=context.world_size == 1)
    except CheckpointException as error:
        cause = _cause(error, context.rank)
        raise CheckpointError(f"{reader.path}: not a usable checkpoint: {cause}") from None
    return planner.targets


class Reader(HuggingFaceStorageReader):
    """Reads safetensors files of any number of processes; none of which the digest is not right.

    Args:
        folder: of the checkpoint.
        digests: SHA-256 of each file.
    """

    def __init__(self, folder: Path, digests: Mapping[str, str]) -> None:
        super().__init__(str(folder))
        self.folder, self.digests = folder, digests
        self._verified: set[str] = set()

    def verify(self, name: str) -> None:
        """Compare a file with its digest, once.

        Raises: CheckpointError: it is not what was written.
        """
        if name in self._verified:
            return
        if file_digest(self.folder / name) != self.digests[name]:
            raise CheckpointError(f"{self.folder / name}: corrupt, its SHA-256 is not the one recorded")
        self._verified.add(name)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what the plan says; the files first go through `verify`."""
        for path in {self.storage_data[item.storage_index].relative_path for item in plan.items}:
            self.verify(Path(path).name)
        return super().read_data(plan, planner)


class _Writer(StorageWriter):
    """One file a process, and a folder that is put in its place when all of them are written."""

    def __init__(self, folder: Path, put: Callable[[dict[str, str]], None]) -> None:
        self.folder, self.put, self.rank = folder, put, 0

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self.rank = int(kwargs["rank"])

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """This process's file; its name and digest stand in each item's result."""
        done: Future[list[WriteResult]] = Future()
        if not plan.items:
            done.set_result([])
            return done
        tensors, offsets = {}, {}
        for item in plan.items:
            assert item.tensor_data is not None
            data = planner.resolve_data(item)
            assert isinstance(data, torch.Tensor)
            tensors[item.index.fqn] = data.detach().cpu().contiguous()
            offsets[item.index.fqn] = {"saved_offsets": list(item.tensor_data.chunk.offsets)}
        path = self.folder / f"state-{self.rank}.safetensors"
        with wrap_os_errors(path):
            places = json.dumps(offsets, sort_keys=True)
            metadata = {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": places}
            write_tensors(path, tensors, metadata)
            fsync(path)
            written = path.name, file_digest(path)
        done.set_result(
            [WriteResult(item.index, tensors[item.index.fqn].nbytes, written) for item in plan.items]
        )
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        self.put(dict(result.storage_data for of_rank in results for result in of_rank))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


class _Planner(DefaultSavePlanner):
    """Plans by the tensors, and writes the copies that were taken of them."""

    def __init__(self, copies: Mapping[str, torch.Tensor] | None) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.copies = copies

    def lookup_object(self, index: MetadataIndex) -> Any:
        return super().lookup_object(index) if self.copies is None else self.copies[index.fqn]


class _Loader(DefaultLoadPlanner):
    """Plans by the tensors, and reads into memory of the CPU, so that they stay as they are."""

    def __init__(self, like: Mapping[str, torch.Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.targets = {name: torch.empty_like(local_rows(t), device="cpu") for name, t in like.items()}

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self.targets[index.fqn]


def _cause(error: CheckpointException, rank: int) -> BaseException:
    """The exception of this process, or another's in words."""
    causes = {other: cause for other, (cause, _) in error.failures.items()}
    if rank in causes:
        return causes[rank]
    words = {
        other: str(cause) if isinstance(cause, InputError) else f"{type(cause).__name__}: {cause}"
        for other, cause in causes.items()
    }
    return InputError("; ".join(f"rank {other}: {sentence}" for other, sentence in words.items()))


def _quiet() -> None:
    # torch warns of a process alone, which is what `no_dist` has just told it.
    warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
