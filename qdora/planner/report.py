"""What an estimate says: the bytes of a training step by kind and by phase, and how sizes are written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

import torch
from torch import nn

from qdora.adapters.base import AdapterModule, SharedBuffers
from qdora.quant.base import FrozenWeight

K = TypeVar("K")


class Part(StrEnum):
    """Why a tensor is in memory."""

    WEIGHTS = "weights"
    """Quantized or dense weights, embeddings, norm weights; a rank's shards where sharded."""
    STATISTICS = "statistics"
    """Block scales of a quantized weight and the statistics of their own quantization."""
    ADAPTERS = "adapters"
    """Trained parameters, the magnitude's frozen start, cached row norms, VeRA's matrices."""
    GRADIENTS = "gradients"
    """Of the trained parameters; a rank's shards where sharded."""
    OPTIMIZER = "optimizer"
    """Moments, and float32 masters where the parameters are not their own."""
    ACTIVATIONS = "activations"
    """What forward keeps for backward, and what either works on."""
    TILES = "tiles"
    """Tiles of frozen weights in the compute dtype."""
    GATHERED = "gather buffers"
    """Layers gathered by FSDP, their gradients until those are scattered, and buffers of its collectives."""
    LOGITS = "logits"
    """Logits of a chunk of the labelled tokens, and their gradients."""
    OTHER = "other"
    """The batch, rotary frequencies, and what belongs to nothing above."""
    OFFLOADED = "offloaded activations"
    """Inputs of recomputed layers that are kept in CPU memory."""

    @classmethod
    def of(cls, module: nn.Module, name: str, tensor: torch.Tensor) -> Part:
        """The kind of a module's own parameter or buffer."""
        if tensor.requires_grad or isinstance(module, AdapterModule | SharedBuffers):
            return cls.ADAPTERS
        if isinstance(module, FrozenWeight) and module.is_statistic(name):
            return cls.STATISTICS
        return cls.WEIGHTS if isinstance(tensor, nn.Parameter) else cls.OTHER


class Breakdown(dict[Part, int]):
    """Bytes by kind at one moment; every kind is a key, with 0 where it is not given."""

    def __init__(self, parts: Mapping[Part, int]) -> None:
        super().__init__({part: parts.get(part, 0) for part in Part})

    @property
    def total(self) -> int:
        """Bytes of all kinds."""
        return sum(self.values())

    def plus(self, other: Mapping[Part, int], times: int = 1) -> Breakdown:
        """These bytes, and so many times the other ones."""
        return Breakdown(added(self, other, times))


@dataclass(frozen=True)
class Moment:
    """A point of a step.

    Attributes:
        held: what is in memory.
        exchanged: bytes of all ranks' shards since the step began, by collective.
    """

    held: Breakdown
    exchanged: Mapping[str, int]

    def plus(self, other: Moment, times: int = 1) -> Moment:
        """Both figures, and so many times the other ones."""
        held = self.held.plus(other.held, times)
        return Moment(held, added(self.exchanged, other.exchanged, times))


@dataclass(frozen=True)
class StepRecord:
    """What a step held and sent.

    Attributes:
        peaks: what was in memory at the peak of each phase of the step.
        starts: where each phase began.
        at_rest: between two steps.
        shards: of that, this rank's shards of the parameters.
        exchanged: bytes of all ranks' shards, by collective.
    """

    peaks: Mapping[str, Breakdown]
    starts: Mapping[str, Moment]
    at_rest: Breakdown
    shards: Breakdown
    exchanged: Mapping[str, int]


def added(first: Mapping[K, int], second: Mapping[K, int], times: int = 1) -> dict[K, int]:
    """The first, and so many times the second; a key that is missing is 0."""
    return {key: first.get(key, 0) + times * second.get(key, 0) for key in {**first, **second}}


@dataclass(frozen=True)
class Estimate:
    """The peak memory of a rank.

    Attributes:
        peak: what is on the device at the worst moment of a step.
        moment: which phase that is in; layers counted from 0, or from -1 backwards.
        at_rest: what is on the device between two steps.
        host: what the rank holds in CPU memory where parameters or activations are offloaded; else nothing.
        exchanged: bytes of all ranks' shards that a step gathers, scatters and sums, by collective.
    """

    peak: Breakdown
    moment: str
    at_rest: Breakdown
    host: Breakdown
    exchanged: Mapping[str, int]

    @classmethod
    def of(cls, step: StepRecord, offload: bool) -> Estimate:
        """Read a recorded step.

        Args:
            offload: whether a rank's shards, their gradients and moments are in CPU memory; activations that
                are offloaded are known by their kind.
        """

        def split(held: Breakdown) -> tuple[Breakdown, Breakdown]:
            moved = step.shards | {p: held[p] for p in (Part.GRADIENTS, Part.OPTIMIZER)} if offload else {}
            host = Breakdown(moved | {Part.OFFLOADED: held[Part.OFFLOADED]})
            return Breakdown({part: size - host[part] for part, size in held.items()}), host

        peaks = {phase: split(peak) for phase, peak in step.peaks.items()}
        moment = max(peaks, key=lambda phase: peaks[phase][0].total)
        host = max((host for _, host in peaks.values()), key=lambda host: host.total)
        return cls(peaks[moment][0], moment, split(step.at_rest)[0], host, step.exchanged)
