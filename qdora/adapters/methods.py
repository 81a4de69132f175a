"""The table of methods: each is a choice on three axes, base, direction and magnitude."""

from __future__ import annotations

from dataclasses import dataclass

from qdora.config import BaseKind, Method


@dataclass(frozen=True)
class MethodSpec:
    """One row: what an adapted layer consists of."""

    base: BaseKind
    direction: bool
    magnitude: bool
    source: str


METHODS: dict[Method, MethodSpec] = {
    "lora": MethodSpec("dense", direction=True, magnitude=False, source="arXiv:2106.09685"),
    "dora": MethodSpec("dense", direction=True, magnitude=True, source="arXiv:2402.09353"),
    "qlora": MethodSpec("nf4", direction=True, magnitude=False, source="arXiv:2305.14314"),
    "qdora": MethodSpec("nf4", direction=True, magnitude=True, source="arXiv:2402.09353 §6"),
}
