"""What `accelerate launch` was told about FSDP, read from the environment that it gives each process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

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
