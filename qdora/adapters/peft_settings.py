"""What each setting of PEFT's adapter_config.json means here, so that none is ignored that changes a number.

A setting is read, has no effect on a saved adapter, or must have the value with which PEFT computes nothing
else.  Any other is refused by name, unless it is switched off: PEFT writes every field that it has, and one
that is not in use as null, false or empty.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

_LARGEST = 1e300

READ = (
    {"peft_type", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
    | {"r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora", "rank_pattern", "alpha_pattern"}
    | {"init_lora_weights", "projection_prng_key", "save_projection", "vera_dropout"}
    | {"trainable_token_indices"}
    | {"adapter_type", "dora", "magnitude_modules", "qdora_method", "ungated"}  # of our own adapters
)
"""Settings that are read."""

WITHOUT_EFFECT = (
    # What the adapter is, where it comes from, how PEFT goes about it.
    {"task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"}
    | {"runtime_config", "merge_weights"}
    # Tied layers, which are refused; details of a start, of which the file has what came out.
    | {"ensure_weight_tying", "loftq_config", "eva_config", "corda_config", "lora_ga_config"}
    | {"d_initial", "init_weights", "gates"}
    # Of something that another setting switches on.
    | {"megatron_core", "qalora_group_size"}
)
"""Settings that change no number of an adapter that is loaded, whatever they say."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "modules_to_save": (None, []),
    "megatron_config": (None,),
    "layer_replication": (None,),
    "lora_bias": (False,),
    "target_parameters": (None, []),
    "use_qalora": (False, None),
    "alora_invocation_tokens": (None,),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
    "enable_lora": (None,),
}
"""Settings without a counterpart here, with the values under which PEFT computes as without them."""


def refuse_unsupported(settings: Mapping[str, Any]) -> None:
    """Refuse a setting that would change a number and is not followed.

    Raises: ValueError: naming the setting, its value and what is allowed.
    """
    for key, value in settings.items():
        if key in NEUTRAL:
            if value not in NEUTRAL[key]:
                raise ValueError(f"{key} = {value!r} is not supported; allowed: {NEUTRAL[key][0]!r}")
        elif key not in READ | WITHOUT_EFFECT and not _is_off(value):
            raise ValueError(
                f"{key} = {value!r} is unknown: it may change what the adapter computes; allowed: a setting "
                f"that is switched off (null, false or empty), or none of this name"
            )


def _is_off(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {})


def number(settings: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A number of the settings.

    Raises: KeyError: it is missing, and there is no default.  TypeError: it is no finite number.
    """
    return _number(key, settings[key] if default is None else settings.get(key, default))


def patterns(settings: Mapping[str, Any], key: str) -> dict[str, float]:
    """Numbers by pattern of the layers that have them.

    Raises: TypeError: it is no mapping to finite numbers.
    """
    value = settings.get(key) or {}
    if not isinstance(value, dict):
        raise TypeError(f"{key} = {value!r}; expected numbers by pattern")
    return {pattern: _number(f"{key}.{pattern}", each) for pattern, each in value.items()}


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _LARGEST:
        raise TypeError(f"{name} = {value!r}; expected a finite number")
    return value


def refuse_unchosen(settings: Mapping[str, Any], layers: Iterable[str]) -> None:
    """Refuse tensors of layers that the settings leave out: PEFT does not load those.

    Args:
        layers: full names of the layers that the file has tensors of.
    Raises: ValueError: a setting cannot be used, or leaves a layer out.
    """
    targets, excluded = settings.get("target_modules"), settings.get("exclude_modules")
    for name in layers:
        if excluded and _chosen(name, excluded):
            raise ValueError(
                f"exclude_modules = {excluded!r} leaves out {name}, which the file has tensors of"
            )
        if targets not in (None, "all-linear") and not _chosen(name, targets):
            raise ValueError(f"target_modules = {targets!r} leaves out {name}, which the file has tensors of")
        indices = settings.get("layers_to_transform")
        if indices in (None, []) or isinstance(targets, str) or name in (targets or ()):
            continue
        if _index(name, settings.get("layers_pattern")) not in (
            [indices] if isinstance(indices, int) else indices
        ):
            raise ValueError(
                f"layers_to_transform = {indices!r} leaves out {name}, which the file has tensors of"
            )


def _chosen(name: str, modules: str | Collection[str]) -> bool:
    """PEFT's rule: a text is a regular expression of the full name, a list has dotted ends of names."""
    if isinstance(modules, str):
        return expression(modules).fullmatch(name) is not None
    return any(name == module or name.endswith(f".{module}") for module in modules)


def _index(name: str, patterns: str | Collection[str] | None) -> int | None:
    """The number of a layer: the first in its name, or the first after a name that a pattern matches."""
    listed = [patterns] if isinstance(patterns, str) and patterns else list(patterns or ())
    for pattern in [rf"(?:^|.*?\.){p}\.(\d+)\." for p in listed] or [r".*?\.[^.]*\.(\d+)\."]:
        found = expression(pattern).match(name)
        if found:
            return int(found[1])
    return None


def expression(pattern: str) -> re.Pattern[str]:
    """A regular expression of the settings.

    Raises: ValueError: it is none.
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"pattern {pattern!r} is no regular expression: {error}") from None
