"""The goals on an H100, and what this run got: ratios within the run, rates and times of kernels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from qdora.benchmark.gpu.run import Record
from qdora.benchmark.gpu.sizes import Size


def goals(records: Sequence[Record], size: Size) -> list[dict[str, Any]]:
    """Each goal with what was measured, None where it was not, and whether that meets it."""
    figures = {record["stage"]: record.get("figures", {}) for record in records}
    return [
        {"goal": goal, "got": got, "met": None if got is None else bool(low <= got <= high)}
        for goal, low, got, high in _measured(figures, size)
    ]


def _measured(
    figures: dict[str, dict[str, Any]], size: Size
) -> Iterator[tuple[str, float, float | None, float]]:
    """Goal, least and greatest allowed value with the measured one between them."""
    sequences, tokens = size.batches[0]
    step = {"batch": f"{sequences}x{tokens}", "checkpointing": False}
    for peer, most in (("peft qlora", 0.75), ("peft qdora", 0.50), ("qlora", 1.05)):
        ratio = _find(figures, "steps", "ratios", "ratio", step | {"arm": "qdora", "peer": peer})
        yield f"QDoRA step / {peer} step <= {most}", 0, ratio, most
    shape = "{}x{}".format(*size.shapes[0])
    tile = _find(figures, "kernels", "kernels", "ms", {"shape": shape, "kernel": "tile s(W + cBA)"})
    yield f"tile of {shape} <= 0.065 ms", 0, tile, 0.065
    # At the widest output: the most of them.
    widest = "{}x{}".format(*max(size.shapes))
    rate = _find(figures, "kernels", "kernels", "TB/s", {"shape": widest, "kernel": "output_gradients"})
    yield f"output_gradients of {widest} >= 2 TB/s", 2, rate, math.inf
    yield "GPU busy >= 90%", 0.9, figures.get("profile", {}).get("busy / wall"), math.inf
    ratio = _find(figures, "training", "training", "estimate / allocated", step)
    yield "estimate within 10% of peak allocated", 0.9, ratio, 1.1
    kept = [
        row["least certain one"]
        for row in figures.get("correctness", {}).get("kept", [])
        if row["least certain one"] is not None
    ]
    yield "small moves kept >= 95%", 0.95, min(kept, default=None), math.inf
    for stage, table, what in (
        ("correctness", "kernels", "kernels off their float64 bounds"),
        ("fsdp", "fsdp", "sharded runs unlike the unsharded one"),
    ):
        wrong = [not row["ok"] for row in figures.get(stage, {}).get(table, [])]
        yield f"{what}: 0", 0, sum(wrong) if wrong else None, 0


def _find(
    figures: dict[str, dict[str, Any]], stage: str, table: str, column: str, wanted: dict[str, Any]
) -> float | None:
    """A column of the row with these values; None where there is no such row, or not in it."""
    for row in figures.get(stage, {}).get(table, []):
        if column in row and all(row[key] == value for key, value in wanted.items()):
            return float(row[column])
    return None
