"""Adapters of frozen weights: low-rank updates, one file a variant, and their registry; magnitudes."""

from __future__ import annotations

from collections.abc import Mapping

from qdora.adapters.base import LowRankUpdate
from qdora.adapters.lora import LoraUpdate
from qdora.adapters.vera import VeraUpdate
from qdora.config import UpdateType

UPDATES: Mapping[UpdateType, type[LowRankUpdate] | None] = {
    "lora": LoraUpdate,
    "vera": VeraUpdate,
    "none": None,
}
