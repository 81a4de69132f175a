"""Join the processes of a launch within a bounded time, or say what keeps them apart."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, Store
from torch.distributed.rendezvous import rendezvous

from qdora.errors import InputError

TIMEOUT_VARIABLE = "QDORA_TIMEOUT"


def join_processes(environment: Mapping[str, str], *, cpu: bool, sharded: bool) -> None:
    """Make torch's default process group, with our timeout; accelerate takes the one that is there.

    Nothing to do for a process alone, unless the model is to be sharded over it.

    Args:
        environment: `os.environ` of a launched process.
        cpu: compute on the CPU, over gloo.
        sharded: with FSDP. On GPUs its offloaded gradients travel between CPUs as well.
    Raises: InputError: a process that does not come, a port in use, a launch that does not fit the
        machine.
    """
    timeout = read_timeout(environment)
    launched = "LOCAL_RANK" in environment or environment.get("WORLD_SIZE", "1") != "1"
    if dist.is_initialized() or not (launched or sharded):
        return
    rank, count = 0, 1
    store: Store = HashStore()
    if launched:
        rank, count = _place(environment)
        if not cpu:
            torch.cuda.set_device(_own_gpu(environment, torch.cuda.device_count()))
        store = _meet(environment, count, timeout)
    backend = "gloo" if cpu else "cpu:gloo,cuda:nccl" if sharded else "nccl"
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=timeout)
    except RuntimeError as error:
        raise InputError(_in_words(environment, count, timeout, error)) from None


def read_timeout(environment: Mapping[str, str]) -> timedelta:
    """How long to wait for another process, at the start and in every exchange later.

    Raises: InputError: QDORA_TIMEOUT is no positive number of seconds.
    """
    value = environment.get(TIMEOUT_VARIABLE) or "600"
    try:
        timeout = timedelta(seconds=float(value))
    except (ValueError, OverflowError):
        timeout = timedelta(0)
    if not timedelta(seconds=1) <= timeout <= timedelta(days=7):
        raise InputError(f"{TIMEOUT_VARIABLE} is {value!r}; allowed: seconds, from 1 to {7 * 24 * 3600}")
    return timeout


def _place(environment: Mapping[str, str]) -> tuple[int, int]:
    """This process's rank, and how many there are."""
    for variable in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if not environment.get(variable):
            raise InputError(
                f"{variable} is not set, though others of WORLD_SIZE, RANK, LOCAL_RANK, MASTER_ADDR and "
                f"MASTER_PORT are; accelerate launch and torchrun set all of them"
            )
    rank, count = _whole_number(environment, "RANK"), _whole_number(environment, "WORLD_SIZE")
    if rank >= count:
        raise InputError(f"RANK is {rank} and WORLD_SIZE {count}; allowed: ranks 0 to {count - 1}")
    return rank, count


def _meet(environment: Mapping[str, str], count: int, timeout: timedelta) -> Store:
    """The store through which the processes find one another.

    In a thread: where something else listens on the port, torch waits for its answer without end.
    """
    found: list[Store] = []
    errors: list[Exception] = []

    def meet() -> None:
        try:
            found.append(next(rendezvous("env://", timeout=timeout))[0])
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=meet, daemon=True)
    thread.start()
    thread.join(timeout.total_seconds() + 5)  # torch's own timeout comes first and knows more
    if not found:
        raise InputError(_in_words(environment, count, timeout, *errors))
    return found[0]


def _own_gpu(environment: Mapping[str, str], gpus: int) -> int:
    """This process's GPU; every process of a node that has too few refuses."""
    local_rank = _whole_number(environment, "LOCAL_RANK")
    here = max(_whole_number(environment, "LOCAL_WORLD_SIZE", "0"), local_rank + 1)
    if here > gpus:
        raise InputError(
            f"{here} processes were started on this node (LOCAL_RANK, LOCAL_WORLD_SIZE), which has {gpus} "
            f"GPUs; allowed: one process a GPU, num_processes at most {gpus} for each of num_machines"
        )
    return local_rank


def _whole_number(environment: Mapping[str, str], variable: str, default: str = "") -> int:
    value = environment.get(variable, default)
    if not value.isdecimal():
        raise InputError(f"{variable} is {value!r}; allowed: whole numbers from 0, as launchers set them")
    return int(value)


def _in_words(
    environment: Mapping[str, str], count: int, timeout: timedelta, error: Exception | None = None
) -> str:
    address = f"{environment.get('MASTER_ADDR')}:{environment.get('MASTER_PORT')}"
    seconds = f"{timeout.total_seconds():g} s"
    reason = "no answer" if error is None else str(error).partition("\n")[0].rstrip(".")
    if "EADDRINUSE" in reason:
        return (
            f"port {environment.get('MASTER_PORT')} of this machine is in use, by another run perhaps; set "
            f"another main_process_port in the launch configuration, or --main_process_port"
        )
    return (
        f"the {count} processes of this run did not all meet at {address} within {seconds}: {reason}. "
        f"Look whether each was started, with the same main_process_ip, main_process_port and num_processes, "
        f"and whether something else listens on that port; {TIMEOUT_VARIABLE} sets the seconds to wait"
    )
