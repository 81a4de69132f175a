"""What a training step holds in memory, by kind, and how sizes are written."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from qdora.errors import InputError


class Part(StrEnum):
    """Why a tensor is in memory."""

    WEIGHTS = "weights"
    """Packed 4-bit or dense weights, embeddings, norm weights; a rank's shard where sharded."""
    STATISTICS = "statistics"
    """Block scales of NF4 and the statistics of their own quantization."""
    ADAPTERS = "adapters"
    """Trained parameters, the magnitude's frozen start, kept row norms, VeRA's pair."""
    GRADIENTS = "gradients"
    """Of the trained parameters; a rank's shard where sharded."""
    OPTIMIZER = "optimizer"
    """Moments, and float32 masters where the parameters are not their own."""
    ACTIVATIONS = "activations"
    """What forward keeps for backward, and what either works on."""
    TILES = "tiles"
    """Tiles of dequantized weights."""
    GATHERED = "gather buffers"
    """Layers gathered by FSDP, their gradients until those are scattered, and buffers of its collectives."""
    LOGITS = "logits"
    """Logits of a chunk of the labelled tokens, and their gradients."""
    OTHER = "other"
    """The batch, rotary frequencies, and what belongs to nothing above."""


@dataclass(frozen=True)
class Breakdown:
    """Bytes by kind at one moment.

    Attributes:
        parts: every kind, also those with 0 bytes.
    """

    parts: Mapping[Part, int]

    @classmethod
    def of(cls, parts: Mapping[Part, int]) -> Breakdown:
        """With 0 for the kinds that are not given."""
        return cls({part: parts.get(part, 0) for part in Part})

    @property
    def total(self) -> int:
        """Bytes of all kinds."""
        return sum(self.parts.values())

    def __getitem__(self, part: Part) -> int:
        return self.parts[part]

    def __iter__(self) -> Iterator[tuple[Part, int]]:
        return iter(self.parts.items())


_UNITS = {"B": 1} | {
    f"{prefix}{binary}B": (1024 if binary else 1000) ** power
    for power, prefix in enumerate("KMGT", start=1)
    for binary in ("", "i")
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)")


def parse_size(text: str, option: str) -> int:
    """Bytes of "24GiB" (2**30 each) or "24GB" (10**9 each).

    Args:
        option: what to call it in the error.
    Raises: InputError: not a number with a unit, or 0.
    """
    match = _SIZE.fullmatch(text.strip())
    unit = None if match is None else next((u for u in _UNITS if u.lower() == match[2].lower()), None)
    if match is None or unit is None or float(match[1]) <= 0:
        raise InputError(
            f"{option} {text!r}: expected a size above 0 with its unit, 24GiB (24 * 2**30 bytes) or 24GB "
            f"(24 * 10**9 bytes); allowed units: {', '.join(_UNITS)}"
        )
    return int(float(match[1]) * _UNITS[unit])


def show_size(count: int) -> str:
    """Bytes in the binary unit that fits."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if count >= _UNITS[unit]:
            return f"{count / _UNITS[unit]:.2f} {unit}"
    return f"{count} B"
