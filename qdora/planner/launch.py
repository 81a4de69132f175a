"""What a launch file says of the ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from accelerate.commands.config.config_args import load_config_from_file

from qdora.distributed.launch import FsdpSettings, read_fsdp_settings
from qdora.errors import InputError, suggest


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
    """Read a launch file as `accelerate launch --config_file` would.

    Raises: InputError: no such file, one that accelerate refuses, or settings that training refuses.
    """
    try:
        file = load_config_from_file(path)
        kind = getattr(file.distributed_type, "value", file.distributed_type)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"--accelerate-config {path}: cannot be used: {error}") from None
    if kind not in ("NO", "MULTI_GPU", "MULTI_CPU", "FSDP"):
        raise InputError(
            f"--accelerate-config {path}: distributed_type is {kind!r}; "
            f"{suggest(str(kind), ('NO', 'MULTI_GPU', 'FSDP'))}"
        )
    fsdp = read_fsdp_settings(_environment(file.fsdp_config)) if kind == "FSDP" else None
    return LaunchFile(int(file.num_processes), fsdp, "cpu" if file.use_cpu else "cuda")


def _environment(fields: dict[str, Any]) -> dict[str, str]:
    """The variables that the launcher makes of the fields of an FSDP section."""
    renamed = {"fsdp_transformer_layer_cls_to_wrap": "fsdp_transformer_cls_to_wrap"}
    values = {renamed.get(key, key).upper(): str(value) for key, value in fields.items()}
    return {"ACCELERATE_USE_FSDP": "true", **values}
