"""Which layers a pattern of `adapter.targets` means, and what to say of one that means none.

A pattern is a full name, a dotted suffix of one (`q_proj`, `mlp.up_proj`), or a glob over the full name
(`model.layers.0.*`, `*.vision_tower.*.q_proj`).
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Mapping
from typing import TypeVar

from qdora.errors import InputError

Value = TypeVar("Value")

_GLOB, _EXPRESSION = "*?[", "\\(|^$+"


def match_layers(names: Iterable[str], patterns: Iterable[str], key: str) -> list[str]:
    """The names that any pattern matches, in their own order.

    Raises: InputError: a pattern matches nothing; `key` and the nearest that does match something are named.
    """
    names = list(names)
    matched: set[str] = set()
    for pattern in patterns:
        hits = [name for name in names if matches(name, pattern)]
        if not hits:
            raise InputError(f"{key}: {pattern!r} matches no linear layer; {_hint(pattern, names)}")
        matched.update(hits)
    return [name for name in names if name in matched]


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern means this layer."""
    if any(sign in pattern for sign in _GLOB):
        return fnmatch.fnmatchcase(name, pattern)
    return name == pattern or name.endswith("." + pattern)


def first_match(values: Mapping[str, Value], name: str, default: Value) -> Value:
    """The value of the first pattern that means a layer."""
    return next((value for pattern, value in values.items() if matches(name, pattern)), default)


def _hint(pattern: str, names: list[str]) -> str:
    """What the writer of a pattern may have meant."""
    ends = sorted({_end(name) for name in names})
    has = f"this model has: {', '.join(ends) or 'no linear layers'}"
    if names and any(sign in pattern for sign in _EXPRESSION):
        return (
            f"it is no regular expression, but a name, a dotted suffix of one or a glob over the full name, "
            f"which is for example {names[0]}; {has}"
        )
    # A part of the model, or a glob that leaves out what the full names begin with.
    for wider in (f"{pattern}.*", f"*.{pattern}", f"*.{pattern}.*", f"*{pattern}*"):
        hits = [name for name in names if fnmatch.fnmatchcase(name, wider)]
        if hits:
            return (
                f"a glob matches the full name, which is for example {hits[0]}: {wider!r} matches "
                f"{len(hits)} layers"
            )
    near = difflib.get_close_matches(pattern.rsplit(".", 1)[-1], ends, n=1, cutoff=0.4)
    return f"did you mean {near[0]!r}? {has}" if near else has


def _end(name: str) -> str:
    """The last component of a name, with the one before it where that is a number: `to_out.0`."""
    head, _, last = name.rpartition(".")
    return f"{head.rpartition('.')[2]}.{last}" if head and last.isdigit() else last
