"""Layers chosen by name: full names, dotted suffixes, and globs."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Mapping
from typing import TypeVar

from qdora.config import AdapterConfig
from qdora.errors import InputError

Value = TypeVar("Value")


def match_layers(names: Iterable[str], patterns: Iterable[str], key: str) -> list[str]:
    """The names that any pattern matches, in their own order.

    A pattern is a full name, a dotted suffix of one (`q_proj`, `mlp.up_proj`), or a glob over the
    full name (`model.layers.0.*`).

    Raises: InputError: a pattern matches nothing; the nearest last components are named.
    """
    names = list(names)
    matched: set[str] = set()
    for pattern in patterns:
        hits = [name for name in names if matches(name, pattern)]
        if not hits:
            raise InputError(f"{key}: {pattern!r} matches no linear layer; {_nearest(pattern, names)}")
        matched.update(hits)
    return [name for name in names if name in matched]


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern means this layer."""
    if any(sign in pattern for sign in "*?["):
        return fnmatch.fnmatchcase(name, pattern)
    return name == pattern or name.endswith("." + pattern)


def layer_config(config: AdapterConfig, name: str) -> AdapterConfig:
    """The configuration with the rank and alpha that its patterns give to one layer."""
    if not config.rank_pattern and not config.alpha_pattern:
        return config
    own = {
        "r": _first(config.rank_pattern, name, config.r),
        "alpha": _first(config.alpha_pattern, name, config.alpha),
    }
    return config.model_copy(update=own)


def _first(values: Mapping[str, Value], name: str, default: Value) -> Value:
    return next((value for pattern, value in values.items() if matches(name, pattern)), default)


def _nearest(pattern: str, names: list[str]) -> str:
    ends = sorted({name.rsplit(".", 1)[-1] for name in names})
    near = difflib.get_close_matches(pattern.rsplit(".", 1)[-1], ends, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}this model has: {', '.join(ends) or 'no linear layers'}"
