"""Settings of a first run that fits a memory, those that cost least first."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from qdora.config import AdapterConfig, QuantizationName, TrainingConfig
from qdora.errors import InputError
from qdora.planner.advise import Change, first_that_fits
from qdora.planner.architecture import Architecture
from qdora.planner.report import Estimate
from qdora.planner.simulate import Launch
from qdora.resources import show_size

BATCH_SIZE = 16
"""Sequences of an optimizer step, which fitting does not change."""
EFFICIENT_TOKENS = 1024
"""Tokens of a micro-batch below which products are too small to use a GPU well: recomputing layers in larger
micro-batches is cheaper then."""
_STEP = 64
"""Lengths are multiples of this."""
_KEPT = (1.0, 0.99, 0.95)
"""Fractions of the examples that may be kept, in the order of preference."""


@dataclass(frozen=True)
class Starter:
    """Settings that fit.

    Attributes:
        left_out: examples longer than the launch's `max_length`.
        launch: with batch size, accumulation and checkpointing.
        refused: what does not fit, by format and whether layers are recomputed: the estimate of the smallest
            micro-batches that were tried.
    """

    quantization: QuantizationName
    left_out: int
    launch: Launch
    estimate: Estimate
    refused: Mapping[tuple[QuantizationName, bool], Estimate]


def choose(
    architectures: Mapping[QuantizationName, Architecture],
    lengths: Sequence[int],
    context: int | None,
    memory: int,
    device: Literal["cpu", "cuda"],
) -> Starter:
    """The cheapest settings that fit.

    First the base in 16 bits without recomputation, then each quantized one: without recomputation, with it,
    and only then with the longest examples left out.

    Args:
        architectures: of the base in each format, in the order of preference.
        lengths: tokens of each example.
        context: most tokens that the model takes.
        memory: bytes that a step may take.
    Raises: InputError: nothing fits; an architecture is not supported.
    """
    refused: dict[tuple[QuantizationName, bool], Estimate] = {}
    max_length = 0
    for max_length in _max_lengths(lengths, context):
        refused = {}
        for name, architecture in architectures.items():
            for checkpointing in (False,) if name == "none" else (False, True):
                proposal = first_that_fits(
                    architecture, _micro_batches(max_length, device, checkpointing), memory
                )
                if proposal is None:
                    continue
                if proposal.fits:
                    left_out = sum(length > max_length for length in lengths)
                    return Starter(name, left_out, proposal.change.launch, proposal.estimate, refused)
                refused[name, checkpointing] = proposal.estimate
    if not refused:
        # What `first_that_fits` passes over is said by building the model.
        for architecture in architectures.values():
            architecture.build()
    size = show_size(min(estimate.peak.total for estimate in refused.values()))
    raise InputError(
        f"no settings fit in {show_size(memory)}: one example of {max_length} tokens at a time takes {size}; "
        f"take a GPU with more memory, several with configs/accelerate/fsdp.yaml, or a smaller model"
    )


def _max_lengths(lengths: Sequence[int], context: int | None) -> Iterator[int]:
    """From that of the longest example down, each clearly shorter than the one before."""
    most = math.inf if context is None else context
    ordered = sorted(lengths)
    last = math.inf
    for kept in _KEPT:
        longest = ordered[math.ceil(kept * len(ordered)) - 1]
        wanted = int(min(most, max(_STEP, -(-longest // _STEP) * _STEP)))
        if wanted <= 0.75 * last:
            last = wanted
            yield wanted


def _micro_batches(max_length: int, device: Literal["cpu", "cuda"], checkpointing: bool) -> Iterator[Change]:
    """From the batch at once to one sequence at a time; without recomputation only as far as it pays."""
    for count in (2**i for i in range(BATCH_SIZE.bit_length())):
        if count > 1 and BATCH_SIZE // count * max_length < EFFICIENT_TOKENS and not checkpointing:
            return
        training = TrainingConfig(
            max_steps=1,
            batch_size=BATCH_SIZE,
            gradient_accumulation=count,
            gradient_checkpointing=checkpointing,
        )
        yield Change("", "", Launch(AdapterConfig(), training, max_length, 1, None, device))
