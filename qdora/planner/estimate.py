"""How much memory a training run takes on each GPU, and in which moment of a step it takes most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qdora.planner.report import Breakdown, Part
from qdora.planner.simulate import Architecture, Launch, StepRecord, record


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
    peaks = {name: _split(step, peak, offload) for name, peak in step.peaks.items()}
    moment = max(peaks, key=lambda name: peaks[name][0].total)
    host = max((away for _, away in peaks.values()), key=lambda away: away.total)
    at_rest, _ = _split(step, step.at_rest, offload)
    return Estimate(peaks[moment][0], moment, at_rest, host, step.exchanged)


def _split(step: StepRecord, moment: Breakdown, offload: bool) -> tuple[Breakdown, Breakdown]:
    """On the device, and in CPU memory: offloaded are a rank's shares, their gradients and moments."""
    away = dict.fromkeys(Part, 0)
    if offload:
        away = dict(step.shards) | {part: moment[part] for part in (Part.GRADIENTS, Part.OPTIMIZER)}
    return Breakdown.of({part: size - away[part] for part, size in moment}), Breakdown.of(away)
