"""The processes of a run as the training loop sees them: a rank, a count, sums and gathered objects."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from qdora.errors import InputError
from qdora.parallel.join import join_processes
from qdora.parallel.launch_settings import FsdpSettings, read_flag, read_fsdp_settings


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
