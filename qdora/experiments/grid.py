"""Grids of settings out of which an arm's best is chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class GridPoint:
    """One point of an arm's grid, as it was scored on the validation split.

    Attributes:
        arm: name of the arm.
        settings: the values that the grid varies, by dotted key.
        correct: right answers by the headline scorer.
        total: questions of the validation split.
        chosen: whether the arm was trained with these settings for the comparison.
        directory: of its run.
    """

    arm: str
    settings: Mapping[str, Any]
    correct: int
    total: int
    chosen: bool
    directory: str
