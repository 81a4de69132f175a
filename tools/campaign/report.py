"""What a stage of the campaign tried and found."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from tabulate import tabulate


@dataclass
class Report:
    """Counts of one stage.

    Attributes:
        stage: its name.
        counts: how many cases there were of each kind and outcome, by `kind: outcome`.
        faults: one line for each case that broke a promise, with what reproduces it.
    """

    stage: str
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    @property
    def tried(self) -> int:
        """Cases in all."""
        return self.counts.total()

    def count(self, kind: str, outcome: str) -> None:
        """Note a case that ended as promised."""
        self.counts[f"{kind}: {outcome}"] += 1

    def fault(self, kind: str, line: str) -> None:
        """Note a case that did not."""
        self.counts[f"{kind}: FAULT"] += 1
        self.faults.append(f"{kind}: {line}")

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"stage": self.stage, "counts": dict(self.counts), "faults": self.faults, "tried": self.tried}

    def __str__(self) -> str:
        rows = [*sorted(self.counts.items()), ("all", self.tried)]
        return "\n".join([tabulate(rows, headers=(self.stage, "cases")), *self.faults])
