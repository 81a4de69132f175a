"""The memory of one training step, from a step that is cut short where it repeats itself.

Tests hold it against the full step, byte by byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from qdora.planner.architecture import Architecture, same_layers
from qdora.planner.report import Breakdown, Estimate, K, Part, StepRecord, added
from qdora.planner.simulate import (
    OPTIMIZER,
    UPDATE,
    Launch,
    adapted_model,
    layer_name,
    record_step,
    recorded_accumulation,
)

_FIRST = 2
"""Layers at the front that see what no others do: the first one's input needs no gradient, the second one's
backward is the last before that."""


def estimate(architecture: Architecture, launch: Launch) -> Estimate:
    """Run a step on fake tensors and read its worst moment.

    Raises: InputError: as `record_step`.
    """
    return Estimate.of(record(architecture, launch), launch.offload)


def record(architecture: Architecture, launch: Launch) -> StepRecord:
    """As `record_step` of the model, from a step that is cut short where it repeats itself.

    Of micro-batches the last one runs, of the loss two chunks, and of layers that are alike four or five: two
    at the front and one at the end, where they are gathered two; between them one, or a group, whose like are
    added.

    Raises: InputError: as `record_step`.
    """
    # Layers repeat one by one, or in groups of which only the first is recomputed.
    group = launch.training.checkpoint_every if launch.checkpointing else 1
    ends = _FIRST + (1 if launch.fsdp is None else 2)
    least = ends + (architecture.depth - ends) % group
    if architecture.depth <= least + group or not layers_alike(architecture, launch):
        return record_step(architecture.build(), launch, micro_batches=1)
    step = record_step(architecture.build(least + group), launch, micro_batches=1)
    groups = (architecture.depth - least) // group - 1
    middle = _Middle(least + group, group, groups, recorded_accumulation(launch))
    return _extended(step, _idle(architecture, launch, least), middle)


def _idle(architecture: Architecture, launch: Launch, depth: int) -> StepRecord:
    """A step of a few layers without a micro-batch: the same for all launches that differ in those alone."""
    training = launch.with_training(
        batch_size=2 * launch.world_size,
        gradient_accumulation=2,
        gradient_checkpointing=False,
        checkpoint_every=1,
        offload_activations=False,
    ).training
    idle = replace(launch, training=training, max_length=1, packing="none")
    key = f"{depth} {idle}"
    if key not in architecture.idle_steps:
        architecture.idle_steps[key] = record_step(architecture.build(depth), idle, micro_batches=0)
    return architecture.idle_steps[key]


@dataclass(frozen=True)
class _Middle:
    """The layers of a recorded step whose like are added.

    Attributes:
        depth: layers of the recorded model.
        group: how many of them, from the third on, are in the middle.
        groups: how often those come again in the model.
        micro_batches: of the step; the last one is run.
    """

    depth: int
    group: int
    groups: int
    micro_batches: int

    def phase(self, kind: str, layer: int) -> str:
        """Name of the forward or backward pass of a layer."""
        return f"{kind} of layer {layer_name(layer, self.depth)}, micro-batch {self.micro_batches - 1}"


def _extended(step: StepRecord, idle: StepRecord, middle: _Middle) -> StepRecord:
    """The record of a step of a model with more layers, all of them alike.

    Args:
        idle: of `_idle`, without the layers in the middle.
    """
    first, behind = _FIRST, _FIRST + middle.group
    groups = middle.groups
    inside = {middle.phase(kind, i) for kind in ("forward", "backward") for i in range(first, behind)}
    passed = {}
    for kind, start, end in (("forward", first, behind), ("backward", behind - 1, first - 1)):
        end_phase = middle.phase(kind, end)
        passed[end_phase] = step.starts[end_phase].plus(step.starts[middle.phase(kind, start)], -1)

    def of_missing(of_step: Mapping[K, int], of_idle: Mapping[K, int]) -> dict[K, int]:
        return {key: groups * size for key, size in added(of_step, of_idle, -1).items()}

    peaks: dict[str, Breakdown] = {}
    at_rest = of_missing(step.at_rest, idle.at_rest)
    of_layers = Breakdown(at_rest)
    for phase, peak in step.peaks.items():
        if phase in idle.starts and phase not in (UPDATE, OPTIMIZER):
            held = of_missing(step.starts[phase].held, idle.starts[phase].held)
            # The batch there is another one, and belongs to no layer.
            of_layers = Breakdown(held | {Part.OTHER: at_rest[Part.OTHER]})
        elif phase in passed:
            of_layers = of_layers.plus(passed[phase].held, groups)
        if phase not in inside:
            peaks[phase] = peak.plus(of_layers)
    # What the update makes of each layer's tensors comes on top of what it finds.
    for phase in (UPDATE, OPTIMIZER):
        made, less = (one.peaks[phase].plus(one.starts[phase].held, -1) for one in (step, idle))
        peaks[phase] = peaks[phase].plus(of_missing(made, less))
    exchanged = added(step.exchanged, step.starts[UPDATE].exchanged, -middle.micro_batches)
    exchanged = of_missing(exchanged, idle.exchanged)
    for one in passed.values():
        exchanged = added(exchanged, one.exchanged, middle.micro_batches * groups)
    return StepRecord(
        peaks,
        {},
        step.at_rest.plus(at_rest),
        step.shards.plus(of_missing(step.shards, idle.shards)),
        added(step.exchanged, exchanged),
    )


def layers_alike(architecture: Architecture, launch: Launch) -> bool:
    """Whether every decoder layer has the same tensors, and the same adapters on them.

    Raises: InputError: the adapter does not fit the model.
    """
    kinds = getattr(architecture.config.get_text_config(), "layer_types", None) or ()
    adapter = launch.adapter
    patterns = (*adapter.targets, *(adapter.magnitude_targets or ()))
    patterns += (*adapter.rank_pattern, *adapter.alpha_pattern)
    # A module's bare name means it in every layer: what the adapters add needs not be built to be compared.
    named = all(pattern.isidentifier() for pattern in patterns)
    same = architecture.layers_alike if named else same_layers(adapted_model(architecture, launch))
    return same and len(set(kinds)) < 2
