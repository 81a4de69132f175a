"""The distributed context: rank, world size, device mesh, collectives, and errors that end all ranks."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed import DistError
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from qdora.distributed.launch import (
    FsdpSettings,
    join_processes,
    read_flag,
    read_fsdp_settings,
    read_timeout,
)
from qdora.errors import InputError
from qdora.quant.base import Shard

if TYPE_CHECKING:
    from accelerate import Accelerator


class DistributedContext:
    """This process's rank in a run, and the run's collectives; a process alone is world_size 1.

    Without FSDP each rank holds the full model. Adapters are small, so their gradients are summed in one
    float32 vector after the last micro-batch; the frozen base never travels.

    Attributes:
        rank, world_size: of this process and of the run.
        device: on which this rank computes.
        fsdp: how the model is sharded; None where each rank holds all of it.
        mesh: all ranks in one dimension; with FSDP only.
        accelerator: which keeps the trackers of a launched run; None for a process alone.
        group: process group of `gather` and `raise_on_all_ranks`; None for the default one.
    """

    def __init__(
        self,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | None = None,
        fsdp: FsdpSettings | None = None,
        accelerator: Accelerator | None = None,
    ) -> None:
        self.rank, self.world_size = rank, world_size
        self.device = device or torch.device("cpu")
        self.fsdp, self.accelerator = fsdp, accelerator
        self.group: dist.ProcessGroup | None = None
        self.mesh: DeviceMesh | None = None
        if fsdp is not None:
            self.mesh = init_device_mesh(self.device.type, (world_size,), mesh_dim_names=("shard",))

    @classmethod
    def from_launch(cls, trackers: Iterable[str] = (), project_dir: str | None = None) -> DistributedContext:
        """Join the processes that `accelerate launch` started.

        Raises: InputError: the launch configuration asks for a kind of sharding or precision that
            is not supported; a rank does not join.
        """
        fsdp = read_fsdp_settings(os.environ)
        for variable, what in _UNSUPPORTED.items():
            if read_flag(os.environ, variable):
                raise InputError(
                    f"the launch configuration asks for {what} ({variable}); allowed: distributed_type NO, "
                    f"MULTI_GPU or FSDP; several CPU processes: FSDP, or torchrun"
                )
        precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if precision not in ("no", ""):
            raise InputError(
                f"the launch configuration asks for mixed precision {precision!r}; the compute dtype is "
                f"set by model.dtype: allowed in the launch configuration is mixed_precision 'no'"
            )
        cpu = not torch.cuda.is_available() or read_flag(os.environ, "ACCELERATE_USE_CPU")
        join_processes(os.environ, cpu=cpu, sharded=fsdp is not None)
        if fsdp is not None:
            # Every rank reads its own rows; transformers must not leave weights out on its own account.
            os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
        from accelerate import Accelerator  # of a launch alone

        accelerator = Accelerator(
            cpu=cpu, mixed_precision="no", log_with=list(trackers) or None, project_dir=project_dir
        )
        rank, world_size = accelerator.process_index, accelerator.num_processes
        return cls(rank, world_size, accelerator.device, fsdp, accelerator)

    def with_new_group(self) -> DistributedContext:
        """The same ranks over a gloo process group of their own, for a thread; a collective.

        Collectives that two threads issue over one group would mix.
        """
        context = copy.copy(self)
        if self.world_size > 1:
            context.group = dist.new_group(backend="gloo", timeout=read_timeout(os.environ))
        return context

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and shows progress."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """Print a line on standard error, on the main rank only."""
        if self.is_main:
            print(text, file=sys.stderr)

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter], extras: torch.Tensor) -> torch.Tensor:
        """Sum the gradients over the ranks, in place, and a small vector with them.

        A rank whose part of the batch was empty adds zeros. With FSDP backward has summed the gradients.

        Args:
            parameters: their gradients are float32.
            extras: (K,) float64 or float32 numbers.
        Returns: (K,) the summed extras, float64 on the device that computes; nothing waits for them.
        """
        if self.world_size > 1 and self.fsdp is None:
            gradients = []
            for p in parameters:
                if p.grad is None:
                    p.grad = torch.zeros_like(p, dtype=torch.float32)
                gradients.append(p.grad)
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
            dist.all_reduce(flat)
            parts = flat.split([gradient.numel() for gradient in gradients])
            views = [part.view_as(gradient) for gradient, part in zip(gradients, parts, strict=True)]
            torch._foreach_copy_(gradients, views)
        return self._summed(extras)

    def sum(self, vector: torch.Tensor) -> torch.Tensor:
        """Sum a small vector over the ranks, in float64.

        Args:
            vector: (K,) numbers, the same K on every rank; on any device.
        Returns: (K,) float64 on the CPU, the same bits on every rank.
        """
        return self._summed(vector).cpu()

    def _summed(self, vector: torch.Tensor) -> torch.Tensor:
        summed = vector.detach().to(self.device, torch.float64, copy=True)
        if self.world_size > 1:
            dist.all_reduce(summed)
        return summed

    def gather(self, items: list[Any]) -> list[Any]:
        """The items of all ranks in one list, in order of rank, on every rank."""
        if self.world_size == 1:
            return items
        of_ranks: list[list[Any]] = [[] for _ in range(self.world_size)]
        dist.all_gather_object(of_ranks, items, group=self.group)
        return [item for of_rank in of_ranks for item in of_rank]

    @property
    def shard(self) -> Shard:
        """This rank's part of every sharded tensor; all of it without FSDP."""
        return Shard() if self.mesh is None else Shard(self.mesh.get_local_rank(), self.mesh.size())

    @property
    def storage_device(self) -> torch.device:
        """Where shards are kept: the CPU with offload, else the device that computes."""
        return torch.device("cpu") if self.fsdp is not None and self.fsdp.offload else self.device

    def gather_rows(self, rows: torch.Tensor, size: int) -> torch.Tensor:
        """(size, ...) the rows of all ranks, in order, each rank giving those of its shard; a collective."""
        if self.mesh is None:
            return rows
        step = -(-size // self.mesh.size())
        padded = rows.new_zeros(step, *rows.shape[1:])
        padded[: rows.shape[0]] = rows
        gathered = rows.new_empty(step * self.mesh.size(), *rows.shape[1:])
        # Before torch 2.13 it has another name, which is deprecated since.
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        all_gather(gathered, padded, group=self.mesh.get_group())
        return gathered[:size]

    def barrier(self) -> None:
        """Block until every rank has come here."""
        if self.world_size > 1:
            dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def start_trackers(self, settings: Mapping[str, Any]) -> None:
        """Open the trackers that the run was launched with; one run of theirs, with its settings."""
        if self.accelerator is not None:
            self.accelerator.init_trackers("qdora", config=dict(settings))

    def track(self, values: Mapping[str, Any], step: int) -> None:
        """Hand numbers of a step to the trackers; nothing where there are none."""
        if self.accelerator is not None:
            self.accelerator.log(dict(values), step=step)

    def end(self) -> None:
        """Close the trackers and leave the process group."""
        if self.accelerator is not None:
            self.accelerator.end_training()

    @contextmanager
    def raise_on_all_ranks(self) -> Iterator[None]:
        """Run a block on every rank; an exception of one ends the block on all.

        The ranks exchange their errors at the end of the block, so inside it there may be no collective.

        Raises: Exception: what the block raised on this rank.
            InputError: the block succeeded here and failed on other ranks; the message says where and why.
        """
        own: Exception | None = None
        try:
            yield
        except Exception as error:
            own = error
        errors = self.gather([None if own is None else _error_text(own)])
        if own is not None:
            raise own
        failed = [f"rank {rank}: {text}" for rank, text in enumerate(errors) if text is not None]
        if failed:
            raise InputError("; ".join(failed))

    @contextmanager
    def on_main_rank(self, enter: Callable[[], AbstractContextManager[object]]) -> Iterator[None]:
        """Hold a context manager on the main rank during the block; where entering it fails, all ranks end.

        Raises: Exception: as `raise_on_all_ranks`.
        """
        with ExitStack() as stack:
            with self.raise_on_all_ranks():
                if self.is_main:
                    stack.enter_context(enter())
            yield

    def refuse_disagreement(self, values: Mapping[str, str]) -> None:
        """Compare what the ranks know about the run; a collective.

        Args:
            values: this rank's short value or digest of each thing, by its name as it shall stand in the
                message ("the configuration").
        Raises: InputError: on every rank, with each value that differs and the ranks that have it.
        """
        of_ranks = self.gather([dict(values)])
        lines = []
        for name in dict.fromkeys(name for of_rank in of_ranks for name in of_rank):
            found = [of_rank.get(name, "nothing") for of_rank in of_ranks]
            if len(set(found)) > 1:
                lines.append(f"{name}: {_ranks_by_value(found)}")
        if lines:
            raise InputError(
                "the processes of this run were started with different input, nothing was done. "
                f"{'. '.join(lines)}. Allowed: the same configuration, files and package versions everywhere"
            )


_UNSUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
}


def _error_text(error: Exception) -> str:
    # A sentence of ours stands for itself; of anything else the kind is half of the message.
    return str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"


def _ranks_by_value(values: Sequence[str]) -> str:
    """`ranks 0-2 and 4 have A, rank 3 has B`."""
    holders: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        holders.setdefault(value, []).append(rank)
    return ", ".join(
        f"rank {ranks[0]} has {value}" if len(ranks) == 1 else f"ranks {_ranges(ranks)} have {value}"
        for value, ranks in holders.items()
    )


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers with runs of three or more written as `first-last`."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and runs[-1][-1] == n - 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    texts = [f"{run[0]}-{run[-1]}" if len(run) > 2 else " and ".join(map(str, run)) for run in runs]
    return ", ".join(texts)


def lost_process(error: BaseException) -> str | None:
    """A sentence on a process that has ended or does not answer; None for any other error.

    Args:
        error: what an exchange between processes raised, or what was raised because of it.
    """
    cause: BaseException | None = error
    while cause is not None:
        # gloo's errors are plain RuntimeErrors that begin with the place in its source.
        if isinstance(cause, DistError) or (
            isinstance(cause, RuntimeError) and "gloo/transport" in str(cause)
        ):
            reason = str(cause).partition("\n")[0]
            return (
                "another process of this run has ended or does not answer, so this one ends too; the other's "
                "own output says why. A training run goes on from its last checkpoint with --resume. "
                f"What this process saw: {reason}"
            )
        cause = cause.__cause__ or cause.__context__
    return None
