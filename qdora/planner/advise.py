"""What to change in a run that does not fit, each change estimated before it is proposed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from qdora.config import AdapterConfig
from qdora.distributed.launch import FsdpSettings
from qdora.errors import InputError
from qdora.planner.architecture import Architecture
from qdora.planner.report import Estimate, Part
from qdora.planner.shorten import estimate
from qdora.planner.simulate import Launch

Kind = Callable[["Launch"], Iterator["Change"]]
"""The changes of one kind to a launch, from mild to strong."""

_PASTED = " --set "
"""Between two settings of the command line."""
_DOUBLINGS = 4
"""Times that a number is doubled or halved in search of one that fits."""


@dataclass(frozen=True)
class Change:
    """A launch with other settings.

    Attributes:
        settings: what to write after `--set`, or in a launch file.
        price: what it costs.
        same_run: whether the run stays the same but for rounding and random draws.
    """

    settings: str
    price: str
    launch: Launch
    same_run: bool = True


@dataclass(frozen=True)
class Proposal:
    """A change and what the run takes with it."""

    change: Change
    estimate: Estimate
    fits: bool


def advise(architecture: Architecture, launch: Launch, now: Estimate, memory: int) -> Iterator[Proposal]:
    """Changes that lower the peak, in the order of `_KINDS`, then in combination where none is enough.

    Args:
        now: the estimate of the launch as it is.
        memory: bytes of the device that the peak may take.
    """
    enough = False
    useful: list[Kind] = []
    for kind in _KINDS:
        proposal = _of_kind(kind, architecture, launch, now, memory)
        if proposal is not None and proposal.estimate.peak.total < now.peak.total:
            enough = enough or (proposal.fits and proposal.change.same_run)
            if proposal.change.same_run and kind is not _more_gpus:
                useful.append(kind)
            yield proposal
    if not enough and len(useful) > 1:
        yield from _combined(architecture, launch, useful, memory)


def mend(architecture: Architecture, launch: Launch, now: Estimate, memory: int) -> Proposal | None:
    """The mildest settings of the command line with which the same run fits; None where there are none.

    Args:
        now: the estimate of the launch as it is.
    """
    useful: list[Kind] = []
    for kind in (_smaller_micro_batches, _checkpointing, _offload_activations):
        proposal = _of_kind(kind, architecture, launch, now, memory)
        if proposal is not None and proposal.fits:
            return proposal
        useful += [] if proposal is None else [kind]
    return next((p for p in _combined(architecture, launch, useful, memory) if p.fits), None)


_OF_TOKENS = (Part.ACTIVATIONS, Part.LOGITS, Part.OTHER)
"""What smaller micro-batches have less of at any moment of a step, at most in proportion."""


def _of_kind(
    kind: Kind, architecture: Architecture, launch: Launch, now: Estimate, memory: int
) -> Proposal | None:
    """As `first_that_fits`, of the changes of one kind to a launch whose estimate is known."""

    def least(changed: Launch) -> int:
        of_tokens = sum(now.peak[part] for part in _OF_TOKENS)
        return now.peak.total - of_tokens + of_tokens * changed.micro_batch_size // launch.micro_batch_size

    bound = least if kind is _smaller_micro_batches else None
    return first_that_fits(architecture, kind(launch), memory, bound)


def first_that_fits(
    architecture: Architecture,
    changes: Iterator[Change],
    memory: int,
    least: Callable[[Launch], int] | None = None,
) -> Proposal | None:
    """Of changes from mild to strong: the mildest that fits, else the strongest; None of none.

    None as well of a change that training refuses: an init that FSDP does not know, say.

    Args:
        least: bytes that a launch takes at least, so that one which cannot fit is not estimated.
    """

    def proposed(change: Change) -> Proposal:
        result = estimate(architecture, change.launch)
        return Proposal(change, result, result.peak.total <= memory)

    ladder = list(changes)
    if not ladder:
        return None
    if least is not None:
        ladder = [change for change in ladder if least(change.launch) <= memory] or ladder[-1:]
    try:
        if least is not None:
            # It takes little more than that as a rule: the first that may fit does.
            nearest = proposed(ladder.pop(0))
            if nearest.fits or not ladder:
                return nearest
        best = proposed(ladder.pop())
    except InputError:
        return None
    while best.fits and ladder:
        # Memory falls along the ladder: half of what is left is settled by its middle.
        middle = len(ladder) // 2
        proposal = proposed(ladder[middle])
        best, ladder = (proposal, ladder[:middle]) if proposal.fits else (best, ladder[middle + 1 :])
    return best


def _combined(
    architecture: Architecture, launch: Launch, kinds: list[Kind], memory: int
) -> Iterator[Proposal]:
    """One change after the other on top of the ones before, until it fits."""
    settings: list[str] = []
    for kind in kinds:
        proposal = first_that_fits(architecture, kind(launch), memory)
        if proposal is None:
            continue
        launch = proposal.change.launch
        settings.append(proposal.change.settings)
        if len(settings) > 1:
            yield replace(proposal, change=Change(_joined(settings), "all of these", launch))
        if proposal.fits:
            return


def _joined(settings: list[str]) -> str:
    """Several settings in one line: those of the command line as they are pasted there, then the others."""
    pasted = _PASTED.join(one for one in settings if "=" in one)
    return " and ".join([*([pasted] if pasted else []), *(one for one in settings if "=" not in one)])


def _checkpointing(launch: Launch) -> Iterator[Change]:
    """Every fourth layer, every second, each; of those, what is more than is recomputed already."""
    for every in (4, 2, 1):
        if not launch.checkpointing or every < launch.training.checkpoint_every:
            which = {1: "each layer", 2: "every second layer", 4: "every fourth layer"}[every]
            wanted = {"gradient_checkpointing": True, "checkpoint_every": every}
            yield _training_change(launch, f"{which} is computed twice", wanted)


def _offload_activations(launch: Launch) -> Iterator[Change]:
    if launch.device != "cpu" and not launch.training.offload_activations:
        wanted = {"gradient_checkpointing": True, "offload_activations": True}
        again = "" if launch.checkpointing else "each layer is computed twice, "
        price = f"{again}layers' inputs cross PCIe twice"
        yield _training_change(launch, price, wanted)


def _training_change(launch: Launch, price: str, wanted: Mapping[str, bool | int]) -> Change:
    """A change of training settings that names only those which differ."""
    new = {key: value for key, value in wanted.items() if getattr(launch.training, key) != value}
    settings = _PASTED.join(f"training.{key}={str(value).lower()}" for key, value in new.items())
    return Change(settings, price, launch.with_training(**new))


def _smaller_micro_batches(launch: Launch) -> Iterator[Change]:
    of_rank = launch.training.batch_size // launch.world_size
    for count in range(launch.training.gradient_accumulation + 1, of_rank + 1):
        if of_rank % count == 0:
            changed = launch.with_training(gradient_accumulation=count)
            price = "more gathers a step" if launch.fsdp else "smaller products"
            yield Change(f"training.gradient_accumulation={count}", price, changed)


def _sharding(launch: Launch) -> Iterator[Change]:
    if launch.fsdp is None and launch.world_size > 1:
        sharded = replace(launch, fsdp=FsdpSettings())
        yield Change("configs/accelerate/fsdp.yaml", "layers are gathered", sharded)


def _more_gpus(launch: Launch) -> Iterator[Change]:
    """The batch stays what it is: what each of them accumulates falls first, then its micro-batch."""
    for doubling in range(1, _DOUBLINGS + 1):
        world_size = launch.world_size << doubling
        accumulation = max(1, launch.training.gradient_accumulation >> doubling)
        if launch.training.batch_size % (world_size * accumulation):
            return
        changed = launch.with_training(gradient_accumulation=accumulation)
        changed = replace(changed, world_size=world_size, fsdp=launch.fsdp or FsdpSettings())
        settings = f"{world_size} GPUs"
        if accumulation != launch.training.gradient_accumulation:
            settings += f", training.gradient_accumulation={accumulation}"
        yield Change(settings, "hardware", changed)


def _resharding(launch: Launch) -> Iterator[Change]:
    if launch.fsdp is not None and not launch.fsdp.reshard_after_forward:
        changed = replace(launch, fsdp=replace(launch.fsdp, reshard_after_forward=True))
        yield Change("fsdp_reshard_after_forward: true", "layers are gathered twice", changed)


def _offload(launch: Launch) -> Iterator[Change]:
    if launch.fsdp is not None and not launch.fsdp.offload:
        changed = replace(launch, fsdp=replace(launch.fsdp, offload=True))
        price = "shards cross PCIe at every gather; the optimizer runs on the CPU"
        yield Change("fsdp_offload_params: true", price, changed)


def _shorter_examples(launch: Launch) -> Iterator[Change]:
    for halving in range(1, _DOUBLINGS + 1):
        length = launch.max_length >> halving
        if length < 8:
            return
        changed = replace(launch, max_length=length)
        yield Change(f"data.max_length={length}", "longer examples are refused", changed, same_run=False)


def _lower_rank(launch: Launch) -> Iterator[Change]:
    for halving in range(1, _DOUBLINGS + 1):
        r = launch.adapter.r >> halving
        try:
            adapter = AdapterConfig(**launch.adapter.model_dump() | {"r": r})
        except InputError:  # 0, or odd where the init halves it
            return
        yield Change(f"adapter.r={r}", "another adapter", replace(launch, adapter=adapter), same_run=False)


_KINDS: tuple[Kind, ...] = (
    *(_smaller_micro_batches, _checkpointing, _offload_activations),
    *(_sharding, _resharding, _more_gpus, _offload),
    *(_shorter_examples, _lower_rank),
)
"""In the order of their price, as far as one is known: those that keep the run as it is come first."""
