"""The table of methods: each is a choice on three axes, base, direction and magnitude."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qdora.config import BaseKind, Method

DirectionKind = Literal["lora", "vera"]


@dataclass(frozen=True)
class MethodSpec:
    """One row: what an adapted layer consists of.

    Attributes:
        base: of W in training.
        direction: how the low-rank update is trained; None where there is none.
        magnitude: whether the rows are rescaled to a trained length.
        trains_base: W itself is trained, and every other parameter of the model.
        result: of W afterwards, where it is not `base`.
    """

    base: BaseKind
    direction: DirectionKind | None
    magnitude: bool
    source: str
    trains_base: bool = False
    result: BaseKind | None = None


METHODS: dict[Method, MethodSpec] = {
    "lora": MethodSpec("dense", "lora", magnitude=False, source="arXiv:2106.09685"),
    "dora": MethodSpec("dense", "lora", magnitude=True, source="arXiv:2402.09353"),
    "qlora": MethodSpec("nf4", "lora", magnitude=False, source="arXiv:2305.14314"),
    "qdora": MethodSpec("nf4", "lora", magnitude=True, source="arXiv:2402.09353 §6"),
    "vera": MethodSpec("dense", "vera", magnitude=False, source="arXiv:2310.11454"),
    "qvera": MethodSpec("nf4", "vera", magnitude=False, source="arXiv:2310.11454"),
    "dvora": MethodSpec("dense", "vera", magnitude=True, source="arXiv:2402.09353 §5.2"),
    "qdvora": MethodSpec("nf4", "vera", magnitude=True, source="arXiv:2402.09353 §5.2"),
    "magnitude": MethodSpec("dense", None, magnitude=True, source="arXiv:2402.09353 §5.6"),
    "qmagnitude": MethodSpec("nf4", None, magnitude=True, source="arXiv:2402.09353 §5.6"),
    "full": MethodSpec("dense", None, magnitude=False, source="the baseline", trains_base=True),
    "full-nf4": MethodSpec(
        "dense",
        None,
        magnitude=False,
        source="the baseline, quantized afterwards",
        trains_base=True,
        result="nf4",
    ),
}
