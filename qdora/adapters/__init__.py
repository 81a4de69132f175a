"""Adapters of frozen weights: low-rank updates, one file a variant, and their registry; magnitudes."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from qdora.adapters.base import LowRankUpdate
from qdora.adapters.gated import GatedLoraUpdate
from qdora.adapters.lora import LoraUpdate
from qdora.adapters.vera import VeraUpdate
from qdora.config import UpdateType

UPDATES: Mapping[UpdateType, type[LowRankUpdate] | None] = {
    "lora": LoraUpdate,
    "gated_lora": GatedLoraUpdate,
    "vera": VeraUpdate,
    "none": None,
}


def update_with_keys(keys: Collection[str]) -> type[LowRankUpdate] | None:
    """The variant that saved tensors belong to, by their keys; of those that share some, the one with all.

    Returns: None where no variant has any of them.
    """

    def fit(kind: type[LowRankUpdate]) -> tuple[int, int]:
        own = set(kind.peft_keys.values())
        return len(own.intersection(keys)), -len(own)

    best = max((kind for kind in UPDATES.values() if kind is not None), key=fit)
    return best if fit(best)[0] else None
