"""The memory of one training step, found by running it on fake tensors.

The model is built, adapted, sharded and reset as loading does it, and the loss, the loop and the optimizer
are those of training.  There are no weights, no other rank and no GPU.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from qdora.adapters.adapt import adapt, with_tokens
from qdora.adapters.base import AdapterModule, SharedBuffers
from qdora.adapters.magnitude import Magnitude
from qdora.adapters.tokens import TokenRows
from qdora.config import AdapterConfig, PackingName, TrainingConfig
from qdora.data.batches import Batch, Packing
from qdora.data.tokenize import TokenizedExample
from qdora.distributed.context import DistributedContext
from qdora.distributed.fsdp import replace_parameter, reset_adapters, shard_like, shard_model
from qdora.distributed.launch import FsdpSettings
from qdora.errors import InputError
from qdora.planner.architecture import Architecture
from qdora.planner.internals import StepTracker, fake_ranks, fake_tensors, in_backward, replaced
from qdora.planner.report import Breakdown, Part, StepRecord, added
from qdora.quant.base import parameter_like
from qdora.training import loss
from qdora.training.layers import decoder_layers
from qdora.training.loop import StepBatch, StopRequest, Trainer, micro_batch_size
from qdora.training.loss import chunks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

UPDATE = "update"
"""The phase behind the last micro-batch, in which gradients are clipped."""
OPTIMIZER = "optimizer"
"""The phase behind that, to the end of the step."""
_SKIPPED = "skipped"


@dataclass(frozen=True)
class Launch:
    """A training run as far as its memory goes, apart from the base model.

    Attributes:
        max_length: tokens of the longest example.
        world_size: ranks over which a batch is divided, a GPU each.
        fsdp: how they shard the model; None where each holds all of it.
        device: whose kernels and tile sizes to suppose.
        packing: whether a micro-batch's sequences are joined; rows are full in the worst batch.
    """

    adapter: AdapterConfig
    training: TrainingConfig
    max_length: int
    world_size: int
    fsdp: FsdpSettings | None
    device: Literal["cpu", "cuda"] = "cuda"
    packing: PackingName = "none"

    def with_training(self, **changes: Any) -> Launch:
        """The same launch with other training settings."""
        return replace(self, training=self.training.model_copy(update=changes))

    @property
    def micro_batch_size(self) -> int:
        """Sequences of a micro-batch of one rank.

        Raises: InputError: the batch does not divide over the ranks.
        """
        return micro_batch_size(self.training, self.world_size)

    @property
    def checkpointing(self) -> bool:
        """Whether activations of layers are computed again in backward."""
        return self.training.gradient_checkpointing or bool(self.fsdp and self.fsdp.activation_checkpointing)

    @property
    def offload(self) -> bool:
        """Whether shards, gradients and optimizer state are in CPU memory."""
        return self.fsdp is not None and self.fsdp.offload


def layer_name(layer: int, depth: int) -> int:
    """The same at any depth: 0, 1, ... for the first half, the others -1, -2, ... from the end."""
    return layer if layer < depth // 2 else layer - depth


def recorded_accumulation(launch: Launch) -> int:
    """Of a recorded step: memory before a third one is the same as before the second."""
    return min(2, launch.training.gradient_accumulation)


def adapted_model(architecture: Architecture, launch: Launch) -> PreTrainedModel:
    """The model on the meta device, with what the run trains trainable.

    Raises: InputError: the adapter does not fit the model, or every weight of a quantized one is trained.
    """
    model = architecture.build()
    _adapt(model, launch)
    return model


def _adapt(model: PreTrainedModel, launch: Launch) -> None:
    if launch.fsdp is not None and launch.adapter.trainable_tokens is not None:
        raise InputError("adapter.trainable_tokens does not go with FSDP, which divides the tables' rows")
    adapted = adapt(model, launch.adapter, launch.training.mode)
    first = model.config.get_text_config().vocab_size
    ids = range(first, first + len(launch.adapter.trainable_tokens or ()))  # as if all were new
    with_tokens(model, adapted.report, adapted.config, ids)


def record_step(model: PreTrainedModel, launch: Launch, micro_batches: int | None = None) -> StepRecord:
    """Run one step of the worst batch: every example of the greatest length, each token with a label.

    Args:
        model: on the meta device, nothing trainable; of `Architecture.build`.
        micro_batches: how many are run, the last ones, with two chunks of their loss: their peaks are those
            of all.  Of the others there are the gradients alone.  Everything where None.
    Raises: InputError: the batch does not divide over the ranks, or the adapter does not fit the model.
    """
    ranks = fake_ranks(launch.world_size, launch.fsdp, launch.device)
    with warnings.catch_warnings(action="ignore"), ranks as context:  # fake tensors warn about themselves
        _adapt(model, launch)
        shard_model(model, context)
        tracker = StepTracker(model.config.get_text_config().vocab_size)
        with fake_tensors(), tracker:
            load_fakes(model)
            tracker.follow_fsdp(model)
            reset_adapters(model, context)
            return record_worst_step(model, launch, context, tracker, micro_batches)


def record_worst_step(
    model: PreTrainedModel,
    launch: Launch,
    context: DistributedContext,
    tracker: StepTracker,
    micro_batches: int | None = None,
) -> StepRecord:
    """`record_step` of a model that is loaded, of fake or real tensors.

    Args:
        tracker: entered, and following the model's collectives.
    """

    def first_chunks(count: int, step: int) -> Iterator[slice]:
        # From the second chunk of a loss on, each finds the logits of the one before.
        return islice(chunks(count, step), 2)

    with nullcontext() if micro_batches is None else replaced(loss, "chunks", first_chunks):
        return _WorstBatch(model, launch, context, tracker, micro_batches).record()


def load_fakes(model: PreTrainedModel) -> None:
    """Materialize what a checkpoint would, of a sharded parameter this rank's rows; within `fake_tensors`."""
    for module in model.modules():
        if isinstance(module, Magnitude) and module.start == "original":
            module.start_from(torch.empty(module.initial_O.shape, dtype=module.initial_O.dtype))
        if isinstance(module, TokenRows):
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
        if isinstance(module, AdapterModule | SharedBuffers):
            continue
        for parameter in list(module.parameters(recurse=False)):
            if parameter.is_meta:  # a tied one is there already
                local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                fake = shard_like(parameter, torch.empty(local.shape, dtype=local.dtype))
                replace_parameter(model, parameter, parameter_like(parameter, fake))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


class _WorstBatch(Trainer):
    """The training loop on examples that are as long as they may be, and with named phases of its step.

    A step has at most two micro-batches here: a third finds in memory what the second found.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        launch: Launch,
        context: DistributedContext,
        tracker: StepTracker,
        micro_batches: int | None,
    ) -> None:
        accumulation = recorded_accumulation(launch)
        batch_size = launch.micro_batch_size * accumulation * launch.world_size
        steps = {"max_steps": 1, "epochs": None}
        batch = {"batch_size": batch_size, "gradient_accumulation": accumulation}
        # What a compiled layer keeps is no more: its graph may compute some of it again.
        steps["compile"] = False
        training = launch.training.model_copy(update=steps | batch)
        example = TokenizedExample([0] * launch.max_length, 0, "the longest example")
        packing = Packing.of(launch.packing, launch.max_length)
        super().__init__(model, [example] * batch_size, training, context, pad_id=0, packing=packing)
        self._tracker = tracker
        tracker.follow_gradients(self.parameters.values())
        self._micro_batch = 0
        self._skipped = 0 if micro_batches is None else max(0, accumulation - micro_batches)
        self._loss_of, self.loss = self.loss, self._loss
        layers = decoder_layers(model)
        for i, layer in enumerate(layers):
            name = str(layer_name(i, len(layers)))
            layer.register_forward_pre_hook(lambda *_, name=name: self._enter_forward(name))
            layer.register_forward_hook(lambda _, __, output, name=name: self._leave_forward(name, output))

    def record(self) -> StepRecord:
        """Run a step that finds the optimizer's moments, which the first one makes."""
        self._make_gradients()
        self.optimizer.step(0.0)
        self.optimizer.zero_grad()
        # What is no part of the model are row norms, cached by the adapters.
        self._tracker.mark_rest(Part.ADAPTERS)
        self._tracker.mark(self.optimizer.state().values(), Part.OPTIMIZER)
        # Last: a parameter that is its own master is a parameter.
        for module in self.model.modules():
            tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
            for name, tensor in tensors:
                self._tracker.mark([tensor], Part.of(module, name, tensor))
        at_rest = self._tracker.current
        with self._tracker.elsewhere():
            batch = self.prepare(0)
        self._tracker.restart()
        self.model.train()
        optimizer_step = self.optimizer.step

        def step(rate: float, skip: torch.Tensor) -> None:
            self._tracker.begin(OPTIMIZER)
            optimizer_step(rate)  # what is read from a fake is 1: an optimizer that asks would be skipped

        with replaced(self.optimizer, "step", step):
            self._step(0, batch, StopRequest())
        starts = dict(self._tracker.starts)
        # What was skipped exchanges as much as what ran.
        exchanged = dict(self._tracker.exchanged)
        for _ in range(self._skipped):
            exchanged = added(exchanged, starts[UPDATE].exchanged)
        not_run = {_SKIPPED, *(f"start, micro-batch {i}" for i in range(self._skipped))}
        peaks = {phase: peak for phase, peak in self._tracker.peaks.items() if phase not in not_run}
        return StepRecord(peaks, starts, at_rest, _shards(self.model), exchanged)

    def _make_gradients(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = torch.zeros_like(parameter, dtype=torch.float32)

    def _loss(self, batch: Batch) -> torch.Tensor:
        """The loss of a micro-batch; of one that is skipped, the gradients that it leaves."""
        if self._micro_batch >= self._skipped:
            return self._loss_of(batch)
        self._tracker.begin(_SKIPPED)
        self._make_gradients()
        self._tracker.mark((p.grad for p in self.parameters.values() if p.grad is not None), Part.GRADIENTS)
        return torch.empty(0, requires_grad=True).sum()  # whose gradient takes nothing

    def _micro_batches(self, batch: StepBatch) -> Iterator[Batch]:
        for self._micro_batch, one in enumerate(super()._micro_batches(batch)):
            self._begin("start")
            self._tracker.mark(one.tensors, Part.OTHER)
            yield one
        self._tracker.begin(UPDATE)

    def _begin(self, phase: str) -> None:
        self._tracker.begin(f"{phase}, micro-batch {self._micro_batch}")

    def _enter_forward(self, name: str) -> None:
        if not in_backward():
            self._begin(f"forward of layer {name}")

    def _leave_forward(self, name: str, output: Any) -> None:
        if in_backward():
            return
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: self._begin(f"backward of layer {name}"))
        if name == "-1":
            self._begin("loss")


def _shards(model: nn.Module) -> Breakdown:
    """Bytes of this rank's shards of the parameters; replicated ones are not among them."""
    sizes: Counter[Part] = Counter()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(parameter, DTensor):
                sizes[Part.of(module, name, parameter)] += parameter.to_local().untyped_storage().nbytes()
    return Breakdown(sizes)
