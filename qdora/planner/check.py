"""A run whose worst batch cannot fit is refused before its base is loaded."""

from __future__ import annotations

import math
from typing import Literal, cast

from qdora.config import RunConfig
from qdora.distributed.context import DistributedContext
from qdora.distributed.fsdp import free_memory
from qdora.errors import InputError
from qdora.models.formats import Checkpoint
from qdora.models.load import compute_dtype
from qdora.planner.advise import mend
from qdora.planner.architecture import Architecture, architecture_of
from qdora.planner.internals import apart
from qdora.planner.shorten import estimate
from qdora.planner.simulate import Launch
from qdora.resources import show_size

_BYTES_PER_PARAMETER = 36
"""At most, of a base and of what is trained beside it: four, and twice sixteen."""
_BUFFERS = 2 << 30
"""At most, of tiles, chunks of logits and what collectives need."""


def refuse_what_cannot_fit(
    config: RunConfig,
    checkpoint: Checkpoint,
    longest: int,
    context: DistributedContext,
) -> None:
    """Hold the planner's estimate of the worst batch against the memory that is free; a collective.

    Where a rough bound fits, no step is simulated.

    Args:
        longest: tokens of the longest example that is trained on.
    Raises: InputError: on all ranks, where it does not fit; with the settings that mend it.
    """
    kind = cast("Literal['cpu', 'cuda']", context.device.type)
    launch = Launch(
        adapter=config.adapter,
        training=config.training,
        max_length=config.data.max_length if config.data.packing == "stream" else longest,
        world_size=context.world_size,
        fsdp=context.fsdp,
        device=kind,
        packing=config.data.packing,
    )
    memory = min(context.gather([free_memory(context.device)]))
    with context.raise_on_all_ranks():
        if context.is_main and _bound(checkpoint, launch) > memory:
            compute = compute_dtype(config.model.dtype, context.device)
            architecture = architecture_of(checkpoint, config.model, compute)
            refusal = apart(lambda: _refusal(architecture, launch, memory))
            if refusal is not None:
                raise InputError(refusal)


def _bound(checkpoint: Checkpoint, launch: Launch) -> int:
    """More bytes than a step takes: float32, all weights trained, nothing sharded or recomputed."""
    config = checkpoint.config.get_text_config()
    parameters = sum(math.prod(checkpoint.info(name).shape) for name in checkpoint.names())
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    of_layers = config.num_hidden_layers * (32 * config.hidden_size + 12 * inner)
    tokens = launch.micro_batch_size * launch.max_length
    return int(
        _BYTES_PER_PARAMETER * parameters + 4 * tokens * (of_layers + 3 * config.vocab_size) + _BUFFERS
    )


def _refusal(architecture: Architecture, launch: Launch, memory: int) -> str | None:
    """Why the run cannot be, and what makes it possible; None where it fits."""
    now = estimate(architecture, launch)
    needed = now.peak.total
    if needed <= memory:
        return None
    place = "of this GPU" if launch.device == "cuda" else "of this machine"
    place = place if launch.world_size == 1 else "for each process"
    batch = f"{launch.micro_batch_size} x {launch.max_length} tokens at once"
    proposal = mend(architecture, launch, now, memory)
    if proposal is None:
        hint = "no setting of the run alone mends that; qdora estimate has more GPUs, other lengths and ranks"
    else:
        size = show_size(proposal.estimate.peak.total)
        hint = f"with --set {proposal.change.settings} it takes {size} ({proposal.change.price})"
    return (
        f"the worst batch does not fit: {batch} take {show_size(needed)} by the planner's estimate, and "
        f"{show_size(memory)} {place} are free; {hint}. --ignore-memory goes on anyway"
    )
