"""The launch: FSDP settings of `accelerate launch`, and the process group of the ranks that it started.

The launcher hands its settings to each process in environment variables; `read_launch_file` reads the file
that they come from.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, Store
from torch.distributed.rendezvous import rendezvous

from qdora.config_file import find_shipped
from qdora.errors import InputError, suggest

T = TypeVar("T")

TIMEOUT_VARIABLE = "QDORA_TIMEOUT"

_TRUE, _FALSE = ("true", "1", "yes", "y", "on", "t"), ("false", "0", "no", "n", "off", "f")
_CLASSES = "FSDP_TRANSFORMER_CLS_TO_WRAP"
_WRAPS = {"TRANSFORMER_BASED_WRAP": True, "NO_WRAP": False}
_STATES: dict[str, Literal["sharded", "full"]] = {"SHARDED_STATE_DICT": "sharded", "FULL_STATE_DICT": "full"}
# Fields with one supported meaning: its spellings, and the hint where another is asked for.
_ONLY: dict[str, tuple[tuple[str, ...], str]] = {
    "FSDP_VERSION": (("2",), "set `fsdp_version: 2` (accelerate takes 1 where it is not set)"),
    "FSDP_SHARDING_STRATEGY": (
        ("full_shard", "1"),
        "FULL_SHARD; to keep gathered layers after forward set `fsdp_reshard_after_forward: false`",
    ),
    "FSDP_BACKWARD_PREFETCH": (("no_prefetch",), "leave it out; version 2 prefetches by itself"),
    "FSDP_FORWARD_PREFETCH": (_FALSE, "false; version 2 prefetches by itself"),
    "FSDP_USE_ORIG_PARAMS": (_TRUE, "true; version 2 knows nothing else"),
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": (
        _FALSE,
        "false; `fsdp_activation_checkpointing: true` alone recomputes activations",
    ),
    "FSDP_IGNORED_MODULES": ((), "leave it out; small frozen vectors are never sharded"),
}


@dataclass(frozen=True)
class FsdpSettings:
    """How a model is sharded over the ranks; docs/distributed.md has the fields by accelerate's names.

    Attributes:
        layer_classes: names of the modules whose parameters are gathered at a time; empty for the model's own
            decoder layers.
        wrap: False gathers all parameters at once.
        reshard_after_forward: free a gathered layer after its forward and gather it again in backward.
        offload: keep shards, gradients and optimizer state in CPU memory.
        activation_checkpointing: recompute a layer's activations in backward.
        state_dict_type: checkpoints as local shards of each rank, or as full tensors in one file.
    """

    layer_classes: tuple[str, ...] = ()
    wrap: bool = True
    reshard_after_forward: bool = True
    offload: bool = False
    activation_checkpointing: bool = False
    state_dict_type: Literal["sharded", "full"] = "sharded"


@dataclass(frozen=True)
class LaunchFile:
    """What a file of `accelerate config` says of the ranks.

    Attributes:
        world_size: ranks on all nodes.
        fsdp: how they shard the model; None where each holds all of it.
        device: what they compute on.
    """

    world_size: int
    fsdp: FsdpSettings | None
    device: Literal["cpu", "cuda"]


def read_launch_file(path: str) -> LaunchFile:
    """Read a launch file as `accelerate launch --config_file` would; `qdora:NAME` is a shipped one.

    Raises: InputError: no such file, one that accelerate refuses, or settings that training refuses.
    """
    from accelerate.commands.config.config_args import load_config_from_file  # for `estimate` alone

    shipped = find_shipped(path)
    try:
        file = load_config_from_file(str(shipped))
        kind = getattr(file.distributed_type, "value", file.distributed_type)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"--accelerate-config {path}: cannot be used: {error}") from None
    if kind not in ("NO", "MULTI_GPU", "MULTI_CPU", "FSDP"):
        raise InputError(
            f"--accelerate-config {path}: distributed_type is {kind!r}; "
            f"{suggest(str(kind), ('NO', 'MULTI_GPU', 'FSDP'))}"
        )
    fsdp = None
    if kind == "FSDP":
        # The launcher makes a variable of each field.
        renamed = {"fsdp_transformer_layer_cls_to_wrap": _CLASSES}
        fields = {renamed.get(key, key.upper()): str(value) for key, value in file.fsdp_config.items()}
        fsdp = read_fsdp_settings({"ACCELERATE_USE_FSDP": "true", **fields})
    return LaunchFile(int(file.num_processes), fsdp, "cpu" if file.use_cpu else "cuda")


def read_fsdp_settings(environment: Mapping[str, str]) -> FsdpSettings | None:
    """The settings of a launch with FSDP; None of one without.

    The launcher sends every field, most with a default, so a default that has no meaning in version 2 was not
    asked for, and passes.

    Args:
        environment: `os.environ` of a launched process.
    Raises: InputError: a field that is not supported, by its name, with what is allowed.
    Source: accelerate 1.15, `accelerate/utils/launch.py`, `FullyShardedDataParallelPlugin`.
    """
    if not read_flag(environment, "ACCELERATE_USE_FSDP"):
        return None
    for variable, (supported, hint) in _ONLY.items():
        asked = _value(environment, variable) or ("1" if variable == "FSDP_VERSION" else None)
        if asked is not None and asked.lower() not in supported:
            raise _refusal(variable, asked, hint)
    wrap = _choice(environment, "FSDP_AUTO_WRAP_POLICY", _WRAPS, True)
    value = _value(environment, _CLASSES)
    classes = () if value is None else tuple(name.strip() for name in value.split(","))
    if not all(name.isidentifier() for name in classes):
        raise _refusal(_CLASSES, value, "names of classes with commas between, LlamaDecoderLayer say")
    if classes and not wrap:
        raise _refusal(_CLASSES, value, "none with NO_WRAP; fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP")
    return FsdpSettings(
        layer_classes=classes,
        wrap=wrap,
        reshard_after_forward=read_flag(environment, "FSDP_RESHARD_AFTER_FORWARD", True),
        offload=read_flag(environment, "FSDP_OFFLOAD_PARAMS"),
        activation_checkpointing=read_flag(environment, "FSDP_ACTIVATION_CHECKPOINTING"),
        state_dict_type=_choice(environment, "FSDP_STATE_DICT_TYPE", _STATES, "sharded"),
    )


def read_flag(environment: Mapping[str, str], variable: str, default: bool = False) -> bool:
    """A boolean variable of the launcher, in any spelling that accelerate takes.

    Raises: InputError: another one.
    """
    value = _value(environment, variable)
    if value is None:
        return default
    if value.lower() in (*_TRUE, *_FALSE):
        return value.lower() in _TRUE
    raise _refusal(variable, value, "true, false")


def _choice(environment: Mapping[str, str], variable: str, table: Mapping[str, T], default: T) -> T:
    value = _value(environment, variable)
    if value is None:
        return default
    if value.upper() not in table:
        raise _refusal(variable, value, suggest(value.upper(), table))
    return table[value.upper()]


def _value(environment: Mapping[str, str], variable: str) -> str | None:
    """A variable's value; None for the word None too, which the launcher writes for a field left empty."""
    value = environment.get(variable, "").strip()
    return None if value.lower() in ("", "none") else value


def _refusal(variable: str, value: str | None, allowed: str) -> InputError:
    key = "fsdp_transformer_layer_cls_to_wrap" if variable == _CLASSES else variable.lower()
    name = f"{key} ({variable})" if variable.startswith("FSDP_") else variable
    allowed = allowed if "allowed:" in allowed else f"allowed: {allowed}"
    return InputError(f"launch configuration: {name} is {value!r}; {allowed}")


def join_processes(environment: Mapping[str, str], *, cpu: bool, sharded: bool) -> None:
    """Initialize torch's default process group, with our timeout; accelerate takes the one that is there.

    Without a launcher there is none, unless the model is to be sharded over this one process.

    Args:
        environment: `os.environ` of a launched process.
        cpu: compute on the CPU, over gloo.
        sharded: with FSDP. On GPUs its offloaded gradients are reduced between CPUs as well.
    Raises: InputError: a rank that does not join, a port in use, a launch that does not fit the machine.
    """
    timeout = read_timeout(environment)
    launched = "LOCAL_RANK" in environment or environment.get("WORLD_SIZE", "1") != "1"
    if dist.is_initialized() or not (launched or sharded):
        return
    rank, world_size = 0, 1
    store: Store = HashStore()
    if launched:
        rank, world_size = _rank_and_world_size(environment)
        if not cpu:
            torch.cuda.set_device(_local_gpu(environment, torch.cuda.device_count()))
        store = _rendezvous(environment, world_size, timeout)
    backend = "gloo" if cpu else "cpu:gloo,cuda:nccl" if sharded else "nccl"
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    except RuntimeError as error:
        raise InputError(_rendezvous_failure(environment, world_size, timeout, error)) from None


def read_timeout(environment: Mapping[str, str]) -> timedelta:
    """How long to wait for other ranks, in the rendezvous and in every collective.

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


def _rank_and_world_size(environment: Mapping[str, str]) -> tuple[int, int]:
    for variable in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if not environment.get(variable):
            raise InputError(
                f"{variable} is not set, though others of WORLD_SIZE, RANK, LOCAL_RANK, MASTER_ADDR and "
                f"MASTER_PORT are; accelerate launch and torchrun set all of them"
            )
    rank, world_size = _integer(environment, "RANK"), _integer(environment, "WORLD_SIZE")
    if rank >= world_size:
        raise InputError(f"RANK is {rank} and WORLD_SIZE {world_size}; allowed: ranks 0 to {world_size - 1}")
    return rank, world_size


def _local_gpu(environment: Mapping[str, str], gpus: int) -> int:
    """This rank's GPU; all ranks of a node that has too few refuse."""
    local_rank = _integer(environment, "LOCAL_RANK")
    here = max(_integer(environment, "LOCAL_WORLD_SIZE", "0"), local_rank + 1)
    if here > gpus:
        raise InputError(
            f"{here} processes were started on this node (LOCAL_RANK, LOCAL_WORLD_SIZE), which has {gpus} "
            f"GPUs; allowed: one process a GPU, num_processes at most {gpus} for each of num_machines"
        )
    return local_rank


def _integer(environment: Mapping[str, str], variable: str, default: str = "") -> int:
    value = environment.get(variable, default)
    if not value.isdecimal():
        raise InputError(f"{variable} is {value!r}; allowed: whole numbers from 0, as launchers set them")
    return int(value)


def _rendezvous(environment: Mapping[str, str], world_size: int, timeout: timedelta) -> Store:
    """The store of the rendezvous.

    In a thread: where something else listens on the port, torch waits for its answer without end.
    """
    store: Future[Store] = Future()

    def join() -> None:
        try:
            store.set_result(next(rendezvous("env://", timeout=timeout))[0])
        except Exception as error:
            store.set_exception(error)

    threading.Thread(target=join, daemon=True).start()
    try:
        return store.result(timeout.total_seconds() + 5)  # torch's timeout comes first, with a better message
    except Exception as error:
        raise InputError(_rendezvous_failure(environment, world_size, timeout, error)) from None


def _rendezvous_failure(
    environment: Mapping[str, str], world_size: int, timeout: timedelta, error: Exception
) -> str:
    address = f"{environment.get('MASTER_ADDR')}:{environment.get('MASTER_PORT')}"
    seconds = f"{timeout.total_seconds():g} s"
    reason = str(error).partition("\n")[0].rstrip(".") or "no answer"
    if "EADDRINUSE" in reason:
        return (
            f"port {environment.get('MASTER_PORT')} of this machine is in use, by another run perhaps; set "
            f"another main_process_port in the launch configuration, or --main_process_port"
        )
    return (
        f"the {world_size} processes of this run did not all meet at {address} within {seconds}: {reason}. "
        f"Look whether each was started, with the same main_process_ip, main_process_port and num_processes, "
        f"and whether something else listens on that port; {TIMEOUT_VARIABLE} sets the seconds to wait"
    )
