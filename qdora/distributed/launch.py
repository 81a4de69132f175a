"""What `accelerate launch` was told about FSDP, read from the environment that it gives each process."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, Store
from torch.distributed.rendezvous import rendezvous

from qdora.errors import InputError, suggest

T = TypeVar("T")

_CLASSES = "FSDP_TRANSFORMER_CLS_TO_WRAP"
_WRAPS = {"TRANSFORMER_BASED_WRAP": True, "NO_WRAP": False}
_STATES: dict[str, Literal["sharded", "full"]] = {"SHARDED_STATE_DICT": "sharded", "FULL_STATE_DICT": "full"}


@dataclass(frozen=True)
class FsdpSettings:
    """How a model is sharded over the processes; docs/distributed.md has the fields by accelerate's names.

    Attributes:
        layer_classes: names of the modules that are each gathered as a whole; empty for the model's
            own decoder layers.
        wrap: False gathers the whole model at once.
        reshard_after_forward: free a gathered layer after its forward and gather it again in backward.
        offload: keep shards, gradients and optimizer state in CPU memory.
        activation_checkpointing: recompute a layer's activations in backward.
        state_dict_type: checkpoints in one part per process, or in one file.
    """

    layer_classes: tuple[str, ...] = ()
    wrap: bool = True
    reshard_after_forward: bool = True
    offload: bool = False
    activation_checkpointing: bool = False
    state_dict_type: Literal["sharded", "full"] = "sharded"


def read_fsdp_settings(environment: Mapping[str, str]) -> FsdpSettings | None:
    """The settings of a launch with FSDP; None of one without.

    The launcher sends every field, most with a default, so a default that means nothing in version 2
    says nothing about what was asked for, and passes.

    Args:
        environment: `os.environ` of a launched process.
    Raises: InputError: a field that is not supported, by its name, with what is allowed.
    Source: accelerate 1.15, `accelerate/utils/launch.py`, `FullyShardedDataParallelPlugin`.
    """
    if not read_flag(environment, "ACCELERATE_USE_FSDP"):
        return None
    _refuse_unsupported(environment)
    wrap = _choice(environment, "FSDP_AUTO_WRAP_POLICY", _WRAPS, True)
    classes = _layer_classes(environment)
    if classes and not wrap:
        raise _refusal(
            _CLASSES, ",".join(classes), "none with NO_WRAP; fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP"
        )
    return FsdpSettings(
        layer_classes=classes,
        wrap=wrap,
        reshard_after_forward=read_flag(environment, "FSDP_RESHARD_AFTER_FORWARD", True),
        offload=read_flag(environment, "FSDP_OFFLOAD_PARAMS"),
        activation_checkpointing=read_flag(environment, "FSDP_ACTIVATION_CHECKPOINTING"),
        state_dict_type=_choice(environment, "FSDP_STATE_DICT_TYPE", _STATES, "sharded"),
    )


def read_flag(environment: Mapping[str, str], variable: str, default: bool = False) -> bool:
    """A yes or no of the launcher, in any of the words that accelerate takes.

    Raises: InputError: another word.
    """
    value = _value(environment, variable)
    if value is None:
        return default
    if value.lower() in ("true", "1", "yes", "y", "on", "t"):
        return True
    if value.lower() in ("false", "0", "no", "n", "off", "f"):
        return False
    raise _refusal(variable, value, "true, false")


def _refuse_unsupported(environment: Mapping[str, str]) -> None:
    """Fields of which we have one value only."""
    version = _value(environment, "FSDP_VERSION") or "1"
    if version != "2":
        raise _refusal(
            "FSDP_VERSION", version, "set `fsdp_version: 2` (accelerate takes 1 where it is not set)"
        )
    strategy = _value(environment, "FSDP_SHARDING_STRATEGY") or "FULL_SHARD"
    if strategy.upper() not in ("FULL_SHARD", "1"):
        raise _refusal(
            "FSDP_SHARDING_STRATEGY",
            strategy,
            "FULL_SHARD; to keep gathered layers after forward set `fsdp_reshard_after_forward: false`",
        )
    prefetch = _value(environment, "FSDP_BACKWARD_PREFETCH") or "NO_PREFETCH"
    if prefetch.upper() != "NO_PREFETCH":
        raise _refusal("FSDP_BACKWARD_PREFETCH", prefetch, "leave it out; version 2 prefetches by itself")
    if read_flag(environment, "FSDP_FORWARD_PREFETCH"):
        raise _refusal("FSDP_FORWARD_PREFETCH", "true", "false; version 2 prefetches by itself")
    if not read_flag(environment, "FSDP_USE_ORIG_PARAMS", True):
        raise _refusal("FSDP_USE_ORIG_PARAMS", "false", "true; version 2 knows nothing else")
    if read_flag(environment, "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD"):
        raise _refusal(
            "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD",
            "true",
            "false; `fsdp_activation_checkpointing: true` alone recomputes activations",
        )
    ignored = _value(environment, "FSDP_IGNORED_MODULES")
    if ignored is not None:
        raise _refusal(
            "FSDP_IGNORED_MODULES", ignored, "leave it out; small frozen vectors are never sharded"
        )


def _layer_classes(environment: Mapping[str, str]) -> tuple[str, ...]:
    value = _value(environment, _CLASSES)
    names = [] if value is None else [name.strip() for name in value.split(",")]
    for name in names:
        if not name.isidentifier():
            raise _refusal(
                _CLASSES, value or "", "names of classes with commas between, LlamaDecoderLayer say"
            )
    return tuple(names)


def _choice(environment: Mapping[str, str], variable: str, table: Mapping[str, T], default: T) -> T:
    value = _value(environment, variable)
    if value is None:
        return default
    if value.upper() not in table:
        raise _refusal(variable, value, suggest(value.upper(), table))
    return table[value.upper()]


def _value(environment: Mapping[str, str], variable: str) -> str | None:
    """The launcher writes a field that was left empty as the word None."""
    value = environment.get(variable, "").strip()
    return None if value.lower() in ("", "none") else value


def _refusal(variable: str, value: str, allowed: str) -> InputError:
    key = "fsdp_transformer_layer_cls_to_wrap" if variable == _CLASSES else variable.lower()
    name = f"{key} ({variable})" if variable.startswith("FSDP_") else variable
    allowed = allowed if "allowed:" in allowed else f"allowed: {allowed}"
    return InputError(f"launch configuration: {name} is {value!r}; {allowed}")


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
        raise InputError(_meeting_failure(environment, count, timeout, error)) from None


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
        raise InputError(_meeting_failure(environment, count, timeout, *errors))
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


def _meeting_failure(
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
