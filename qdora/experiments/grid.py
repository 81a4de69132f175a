"""Grids of settings: the points of a sweep, and the choice of the best one of each arm."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

_MANY = 12
"""Keys of one mapping from which on a table has one row for all of them."""

_PLAIN = re.compile(r"[A-Za-z0-9._=,+-]{1,120}")


@dataclass(frozen=True)
class GridPoint:
    """One point of an arm's grid, trained with the first seed and scored on the validation set.

    Attributes:
        arm: name of the arm.
        settings: the swept keys, dotted, with their values.
        correct: validation questions that were answered correctly, over all tasks.
        total: validation questions.
        chosen: whether the arm is trained with all seeds at this point.
        directory: of the run.
    """

    arm: str
    settings: Mapping[str, Any]
    correct: int
    total: int
    chosen: bool
    directory: str


def grid_points(sweep: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """The cartesian product of a sweep's values, in the order of the file, the last key changing fastest.

    Without keys it has one point, which sets nothing.
    """
    return [dict(zip(sweep, values, strict=True)) for values in product(*sweep.values())]


def show_settings(settings: Mapping[str, Any], separator: str = ", ") -> str:
    """Settings as `key=value`, values that are not text in JSON."""
    shown = {key: value if isinstance(value, str) else json.dumps(value) for key, value in settings.items()}
    return separator.join(f"{key}={value}" for key, value in shown.items())


def condensed(rows: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Rows of a table of settings by dotted key; those of a mapping over layers are made one.

    Args:
        rows: values as text, a column an arm.
    """
    mappings: dict[str, list[str]] = {}
    for key in rows:
        mappings.setdefault(".".join(key.split(".")[:2]), []).append(key)
    found: dict[str, list[str]] = {}
    for key, values in rows.items():
        mapping = ".".join(key.split(".")[:2])
        if len(mappings[mapping]) < _MANY:
            found[key] = list(values)
        elif mapping not in found:
            found[mapping] = [
                _span(column) for column in zip(*(rows[one] for one in mappings[mapping]), strict=True)
            ]
    return found


def _span(values: Sequence[str]) -> str:
    """`210 values, 1 to 44`; a value that all have, itself."""
    if len(set(values)) == 1:
        return values[0]
    numbers = [number for value in values if (number := _number(value)) is not None]
    return (
        f"{len(numbers)} values, {min(numbers):g} to {max(numbers):g}" if numbers else f"{len(values)} values"
    )


def point_name(settings: Mapping[str, Any]) -> str:
    """A folder's name for a point, the same in whatever order the keys are swept.

    Settings that a file name cannot hold are named by a digest.
    """
    ordered = dict(sorted(settings.items()))
    name = show_settings(ordered, separator=",")
    if _PLAIN.fullmatch(name):
        return name
    return f"point={hashlib.sha256(json.dumps(ordered, sort_keys=True).encode()).hexdigest()[:16]}"


def choose(points: Sequence[GridPoint]) -> list[GridPoint]:
    """Mark the best point of each arm: most correct answers, of equally good ones the first in the file.

    Args:
        points: of all arms, each arm's in the order of its grid.
    """
    best: dict[str, GridPoint] = {}
    for point in points:
        if point.arm not in best or point.correct > best[point.arm].correct:
            best[point.arm] = point
    return [replace(point, chosen=point is best[point.arm]) for point in points]


def edges(points: Sequence[GridPoint]) -> dict[str, list[str]]:
    """By arm, the swept keys whose chosen number is the smallest or the largest: a better one may lie beyond.

    Args:
        points: of all arms, chosen ones marked.
    """
    found: dict[str, list[str]] = {}
    for chosen in (point for point in points if point.chosen):
        settings = [point.settings for point in points if point.arm == chosen.arm]
        for key, value in chosen.settings.items():
            numbers = [number for each in settings if (number := _number(each[key])) is not None]
            comparable = len(numbers) == len(settings) and len(set(numbers)) > 1
            if comparable and _number(value) in (min(numbers), max(numbers)):
                found.setdefault(chosen.arm, []).append(key)
    return found


def _number(value: object) -> float | None:
    """A number, also as YAML leaves `1e-3`: a text.  None of anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None
