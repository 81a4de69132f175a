"""The processes of a run as the training loop sees them: a rank, a count, sums and gathered objects."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.distributed import DistError
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from qdora.distributed.launch import FsdpSettings, join_processes, read_flag, read_fsdp_settings
from qdora.errors import InputError


class Processes:
    """Accelerate's processes, one of them where nothing was launched.

    Without FSDP each holds the whole model. Adapters are small, so their gradients are summed in one
    float32 vector after the last micro-batch; the frozen base never travels.

    Attributes:
        fsdp: how the model is sharded; None where each process holds all of it.
        mesh: all processes in one dimension; with FSDP only.
    """

    def __init__(self, accelerator: Accelerator, fsdp: FsdpSettings | None = None) -> None:
        self.accelerator = accelerator
        self.rank: int = accelerator.process_index
        self.count: int = accelerator.num_processes
        self.device: torch.device = accelerator.device
        self.fsdp = fsdp
        self.mesh: DeviceMesh | None = None
        if fsdp is not None:
            self.mesh = init_device_mesh(self.device.type, (self.count,), mesh_dim_names=("shard",))

    @classmethod
    def start(cls, trackers: Iterable[str] = (), project_dir: str | None = None) -> Processes:
        """Join the processes that `accelerate launch` started.

        Raises: InputError: the launch configuration asks for a kind of sharding or precision that
            is not supported; the processes cannot meet.
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
        _use_all_cores()
        cpu = not torch.cuda.is_available() or read_flag(os.environ, "ACCELERATE_USE_CPU")
        join_processes(os.environ, cpu=cpu, sharded=fsdp is not None)
        if fsdp is not None:
            # Every process reads its own rows; transformers must not leave weights out on its own account.
            os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
        accelerator = Accelerator(
            cpu=cpu, mixed_precision="no", log_with=list(trackers) or None, project_dir=project_dir
        )
        return cls(accelerator, fsdp)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return bool(self.accelerator.is_main_process)

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter], extras: torch.Tensor) -> torch.Tensor:
        """Sum the gradients over the processes, in place, and a small vector with them.

        A process whose share of the batch was empty adds zeros.

        Args:
            parameters: their gradients are float32.
            extras: (K,) float64 or float32 numbers that travel along.
        Returns: (K,) the summed extras, in float64.
        """
        if self.count == 1:
            return extras.double()
        parameters = list(parameters)
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p, dtype=torch.float32)
        flat = torch.cat([p.grad.reshape(-1) for p in parameters if p.grad is not None])
        flat = self.accelerator.reduce(flat, reduction="sum")
        offset = 0
        for p in parameters:
            assert p.grad is not None
            p.grad.copy_(flat[offset : offset + p.numel()].view_as(p))
            offset += p.numel()
        return self.sum(extras)

    def sum(self, vector: torch.Tensor) -> torch.Tensor:
        """Sum a small vector over the processes, in float64.

        Args:
            vector: (K,) numbers, the same K everywhere; on any device.
        Returns: (K,) float64 on the CPU, the same bits on every process.
        """
        summed = vector.detach().to(self.device, torch.float64, copy=True)
        if self.count > 1:
            dist.all_reduce(summed)
        return summed.cpu()

    def gather(self, items: list[Any]) -> list[Any]:
        """All processes' items, in order of rank, on every process."""
        if self.count == 1:
            return items
        gathered: list[Any] = gather_object(items)
        return gathered

    def wait(self) -> None:
        """Until every process is here."""
        self.accelerator.wait_for_everyone()

    def end(self) -> None:
        """Close trackers and leave the process group."""
        self.accelerator.end_training()


def _use_all_cores() -> None:
    """Undo the launcher's default of one thread a process, which idles all other cores of a CPU run.

    Any other number in OMP_NUM_THREADS was somebody's choice and stays.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    if launched and os.environ.get("OMP_NUM_THREADS") == "1" and not torch.cuda.is_available():
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


_UNSUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
}


def refuse_disagreement(processes: Processes, facts: Mapping[str, str]) -> None:
    """Compare what the processes know about the run; every one of them must call this.

    Args:
        facts: a name in words, as it shall stand in the message ("the configuration"), to a short
            value or digest; every process gives its own.
    Raises: InputError: on every process, with each fact that differs and who has which value.
    """
    everyones = processes.gather([dict(facts)])
    names = dict.fromkeys(name for theirs in everyones for name in theirs)
    lines = []
    for name in names:
        values = [theirs.get(name, "nothing") for theirs in everyones]
        if len(set(values)) > 1:
            lines.append(f"{name}: {_who_has_what(values)}")
    if lines:
        raise InputError(
            "the processes of this run were started with different input, nothing was done. "
            f"{'. '.join(lines)}. Allowed: the same configuration, files and package versions everywhere"
        )


@contextmanager
def together(processes: Processes) -> Iterator[None]:
    """Run a block on every process; an exception on one of them ends it on all.

    Reading files, say: a bad disk under one process must not leave the others waiting for it. The
    processes meet at the end of the block, so inside it nothing may wait for another process.

    Raises: Exception: what the block raised here.
        InputError: the block went well here and failed elsewhere; the message says where and why.
    """
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    errors = processes.gather([None if own is None else _error_text(own)])
    if own is not None:
        raise own
    failed = [f"rank {rank}: {words}" for rank, words in enumerate(errors) if words is not None]
    if failed:
        raise InputError("; ".join(failed))


def _error_text(error: Exception) -> str:
    # A sentence of ours stands for itself; of anything else the kind is half of the message.
    return str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"


def _who_has_what(values: Sequence[str]) -> str:
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
    words = [f"{run[0]}-{run[-1]}" if len(run) > 2 else " and ".join(map(str, run)) for run in runs]
    return ", ".join(words)


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


def end(code: int) -> NoReturn:
    """End this process with an exit code, its work done or refused.

    An ordinary exit after processes have met may abort in a thread of torch, whatever became of the work:
    of a script that meets, gathers and exits, in 7 of 80 tries, and as often where the group is destroyed
    first.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        leave(code)
    sys.exit(code)


def leave(code: int) -> NoReturn:
    """End this process at once.

    An ordinary exit waits for threads of torch that wait for a lost process, or aborts in them.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
