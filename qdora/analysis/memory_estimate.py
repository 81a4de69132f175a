"""How much memory a training run takes on each GPU, and in which moment of a step it takes most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qdora.analysis.memory_depth import Architecture, record
from qdora.analysis.memory_parts import Breakdown, Part
from qdora.analysis.memory_step import Launch, StepRecord

ON_THE_HOST = (Part.WEIGHTS, Part.STATISTICS, Part.ADAPTERS, Part.GRADIENTS, Part.OPTIMIZER)
"""What `fsdp_offload_params` keeps in CPU memory."""


@dataclass(frozen=True)
class Estimate:
    """The peak memory of a process.

    Attributes:
        peak: what is on the device at the worst moment of a step.
        moment: which moment that is; layers counted from 0, or from -1 backwards.
        at_rest: what is there between two steps.
        host: what the process holds in CPU memory where parameters are offloaded; else nothing.
        exchanged: bytes of all ranks' shares together that a step gathers, scatters and sums.
    """

    peak: Breakdown
    moment: str
    at_rest: Breakdown
    host: Breakdown
    exchanged: Mapping[str, int]

    def fits(self, memory: int, reserve: int) -> bool:
        """Whether a device of so many bytes is enough, with some set aside."""
        return self.peak.total + reserve <= memory


def estimate(architecture: Architecture, launch: Launch) -> Estimate:
    """Run a step on fake tensors and read off its worst moment.

    Raises: InputError: the batch does not divide over the processes, or the adapter does not fit the model.
    """
    return _read_off(record(architecture, launch), launch.offload)


def _read_off(step: StepRecord, offload: bool) -> Estimate:
    on_device = {name: _split(peak, offload)[0] for name, peak in step.peaks.items()}
    moment = max(on_device, key=lambda name: on_device[name].total)
    host = max((_split(peak, offload)[1] for peak in step.peaks.values()), key=lambda part: part.total)
    at_rest, _ = _split(step.at_rest, offload)
    return Estimate(on_device[moment], moment, at_rest, host, step.exchanged)


def _split(breakdown: Breakdown, offload: bool) -> tuple[Breakdown, Breakdown]:
    """On the device, and in CPU memory."""
    away = ON_THE_HOST if offload else ()
    return (
        Breakdown.of({part: count for part, count in breakdown if part not in away}),
        Breakdown.of({part: count for part, count in breakdown if part in away}),
    )
