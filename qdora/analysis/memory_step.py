"""The memory of one training step, found by running it on fake tensors.

The model, the sharding, the loss, the loop and the optimizer are those of training.  There are no weights,
no other process and no GPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from transformers import PreTrainedModel

from qdora.analysis.memory_fakes import fake_processes
from qdora.analysis.memory_model import (
    adapt_and_shard,
    decoder_layers,
    fill_with_fakes,
    mark_model,
    shard_sizes,
    start_adapters,
)
from qdora.analysis.memory_parts import Breakdown, Part
from qdora.analysis.memory_tracker import StepTracker
from qdora.config import AdapterConfig, TrainingConfig
from qdora.data.batches import Batch
from qdora.data.tokenize import TokenizedExample
from qdora.parallel.launch_settings import FsdpSettings
from qdora.parallel.processes import Processes
from qdora.training.loop import Trainer, micro_batch_size
from qdora.training.signals import StopRequest


@dataclass(frozen=True)
class Launch:
    """A training run as far as its memory goes, apart from the base model.

    Attributes:
        max_length: tokens of the longest example.
        processes: how many share a batch, a GPU each.
        fsdp: how they shard the model; None where each holds all of it.
        device: whose kernels and tile sizes to suppose.
    """

    adapter: AdapterConfig
    training: TrainingConfig
    max_length: int
    processes: int
    fsdp: FsdpSettings | None
    device: Literal["cpu", "cuda"] = "cuda"

    @property
    def micro_batch_size(self) -> int:
        """Sequences that a process runs at once.

        Raises: InputError: the batch does not divide over the processes.
        """
        return micro_batch_size(self.training, self.processes)

    @property
    def checkpointing(self) -> bool:
        """Whether a layer's activations are computed again in backward."""
        return self.training.gradient_checkpointing or bool(self.fsdp and self.fsdp.activation_checkpointing)

    @property
    def offload(self) -> bool:
        """Whether shards, gradients and optimizer state are in CPU memory."""
        return self.fsdp is not None and self.fsdp.offload


@dataclass(frozen=True)
class StepRecord:
    """What a step held and sent.

    Attributes:
        peaks: the worst moment of each stretch of the step.
        at_rest: between two steps.
        shards: of that, this rank's shares of the parameters.
        exchanged: bytes of all ranks' shares together, by collective.
    """

    peaks: Mapping[str, Breakdown]
    at_rest: Breakdown
    shards: Breakdown
    exchanged: Mapping[str, int]


def record_step(model: PreTrainedModel, launch: Launch) -> StepRecord:
    """Run one step of the worst batch: every example of the greatest length, each token with a label.

    Args:
        model: on the meta device, nothing trainable; of `architecture_skeleton`.
    Raises: InputError: the batch does not divide over the processes, or the adapter does not fit the model.
    """
    with (
        warnings.catch_warnings(),
        fake_processes(launch.processes, launch.fsdp, launch.device) as processes,
    ):
        warnings.simplefilter("ignore")  # of fake tensors, about themselves
        if processes.fsdp is not None:
            assert processes.mesh is not None
            adapt_and_shard(model, launch.adapter, processes.mesh, processes.fsdp)
        tracker = StepTracker(model.config.get_text_config().vocab_size)
        with FakeTensorMode(allow_non_fake_inputs=True), tracker:
            fill_with_fakes(model)
            tracker.follow_fsdp(model)
            start_adapters(model, launch.adapter, sharded=processes.fsdp is not None)
            trainer = _WorstBatch(model, launch, processes, tracker)
            trainer.make_optimizer_state()
            trainer.mark_what_stays()
            at_rest = tracker.current
            tracker.restart()
            trainer.run_step()
        return StepRecord(tracker.peaks, at_rest, shard_sizes(model), dict(tracker.exchanged))


class _WorstBatch(Trainer):
    """The training loop on examples that are as long as they may be, and with stretches of its step named.

    A step has at most two micro-batches here: a third finds in memory what the second found.
    """

    def __init__(
        self, model: PreTrainedModel, launch: Launch, processes: Processes, tracker: StepTracker
    ) -> None:
        accumulation = min(2, launch.training.gradient_accumulation)
        training = launch.training.model_copy(
            update={
                "batch_size": launch.micro_batch_size * accumulation * launch.processes,
                "gradient_accumulation": accumulation,
                "max_steps": 1,
                "epochs": None,
            }
        )
        example = TokenizedExample([0] * launch.max_length, 0, "the longest example")
        super().__init__(model, [example] * training.batch_size, training, processes, pad_id=0)
        self._tracker = tracker
        tracker.follow_gradients(self.parameters.values())
        self._micro_batch = 0
        for name, layer in _names_from_both_ends(decoder_layers(model)).items():
            layer.register_forward_pre_hook(lambda *_, name=name: self._enter_forward(name))
            layer.register_forward_hook(lambda _, __, output, name=name: self._leave_forward(name, output))

    def make_optimizer_state(self) -> None:
        """The first step makes the moments; the worst moment is in a later one."""
        for parameter in self.parameters.values():
            parameter.grad = torch.zeros_like(parameter, dtype=torch.float32)
        self.optimizer.step(0.0)
        self.optimizer.zero_grad()

    def mark_what_stays(self) -> None:
        """What is there before the step and is no part of the model are row norms, kept by the adapters."""
        self._tracker.mark_rest(Part.ADAPTERS)
        self._tracker.mark(self.optimizer.state().values(), Part.OPTIMIZER)
        # Last: a parameter that is its own master is a parameter.
        mark_model(self.model, self._tracker)

    def run_step(self) -> None:
        """One step, as `run` makes many."""
        self.model.train()
        self._step(0, StopRequest())

    def _own_micro_batches(self, batch: list[TokenizedExample]) -> Iterator[Batch]:
        with unset_fake_temporarily():  # how long an example is, is read from its numbers
            batches = list(super()._own_micro_batches(batch))
        for self._micro_batch, one in enumerate(batches):
            self._begin("start")
            self._tracker.mark([one.input_ids_BT, one.labels_BT], Part.OTHER)
            yield one
        self._tracker.begin("update")

    def _begin(self, stretch: str) -> None:
        self._tracker.begin(f"{stretch}, micro-batch {self._micro_batch}")

    def _enter_forward(self, name: str) -> None:
        if not _in_backward():
            self._begin(f"forward of layer {name}")

    def _leave_forward(self, name: str, output: Any) -> None:
        if _in_backward():
            return
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: self._begin(f"backward of layer {name}"))
        if name == "-1":
            self._begin("loss")


def _names_from_both_ends(layers: list[nn.Module]) -> dict[str, nn.Module]:
    """The first half by 0, 1, ..., the other by -1, -2, ... from the end: the same names at any depth."""
    count = len(layers)
    return {str(i if i < count // 2 else i - count): layer for i, layer in enumerate(layers)}


def _in_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)
