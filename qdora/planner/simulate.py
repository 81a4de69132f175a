"""The memory of one training step, found by running it on fake tensors.

The model, the sharding, the loss, the loop and the optimizer are those of training.  There are no weights,
no other process and no GPU.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel

from qdora.adapters.direction import SharedPair
from qdora.adapters.inject import inject
from qdora.adapters.magnitude import Magnitude
from qdora.config import AdapterConfig, TrainingConfig
from qdora.data.batches import Batch
from qdora.data.tokenize import TokenizedExample
from qdora.distributed.context import DistributedContext
from qdora.distributed.fsdp import replace_parameter, shard_like, shard_model, start_sharded
from qdora.distributed.launch import FsdpSettings
from qdora.models.build import Quantization, architecture_skeleton
from qdora.planner.internals import CPU, StepTracker, fake_processes
from qdora.planner.report import Breakdown, Part
from qdora.quant.nf4 import NF4Weight
from qdora.quant.share import Share
from qdora.training.loop import StopRequest, Trainer, micro_batch_size


@dataclass(frozen=True)
class Launch:
    """A training run as far as its memory goes, apart from the base model.

    Attributes:
        max_length: tokens of the longest example.
        world_size: how many share a batch, a GPU each.
        fsdp: how they shard the model; None where each holds all of it.
        device: whose kernels and tile sizes to suppose.
    """

    adapter: AdapterConfig
    training: TrainingConfig
    max_length: int
    world_size: int
    fsdp: FsdpSettings | None
    device: Literal["cpu", "cuda"] = "cuda"

    @property
    def micro_batch_size(self) -> int:
        """Sequences that a process runs at once.

        Raises: InputError: the batch does not divide over the processes.
        """
        return micro_batch_size(self.training, self.world_size)

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
        fake_processes(launch.world_size, launch.fsdp, launch.device) as context,
    ):
        warnings.simplefilter("ignore")  # of fake tensors, about themselves
        if context.fsdp is not None:
            assert context.mesh is not None
            adapt_and_shard(model, launch.adapter, context.mesh, context.fsdp)
        tracker = StepTracker(model.config.get_text_config().vocab_size)
        with FakeTensorMode(allow_non_fake_inputs=True), tracker:
            fill_with_fakes(model)
            tracker.follow_fsdp(model)
            start_adapters(model, launch.adapter, sharded=context.fsdp is not None)
            trainer = _WorstBatch(model, launch, context, tracker)
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
        self, model: PreTrainedModel, launch: Launch, context: DistributedContext, tracker: StepTracker
    ) -> None:
        accumulation = min(2, launch.training.gradient_accumulation)
        training = launch.training.model_copy(
            update={
                "batch_size": launch.micro_batch_size * accumulation * launch.world_size,
                "gradient_accumulation": accumulation,
                "max_steps": 1,
                "epochs": None,
            }
        )
        example = TokenizedExample([0] * launch.max_length, 0, "the longest example")
        super().__init__(model, [example] * training.batch_size, training, context, pad_id=0)
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


def adapt_and_shard(
    model: PreTrainedModel, adapter: AdapterConfig, mesh: DeviceMesh, settings: FsdpSettings
) -> None:
    """Give a skeleton its adapters and shard it, as a launch with FSDP does; outside the fake mode."""
    inject(model, adapter)
    shard_model(model, mesh, settings)


def fill_with_fakes(model: nn.Module) -> None:
    """Put a fake tensor wherever a checkpoint's would go, of a sharded parameter this rank's rows.

    Within the fake mode.
    """
    for parameter in list(model.parameters()):
        local = torch.empty(_local_shape(parameter), dtype=parameter.dtype)
        fake = nn.Parameter(shard_like(parameter, local), requires_grad=parameter.requires_grad)
        replace_parameter(model, parameter, fake)
    for module in model.modules():
        if isinstance(module, SharedPair):
            continue  # draws its own
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def start_adapters(model: PreTrainedModel, adapter: AdapterConfig, *, sharded: bool) -> None:
    """Bring the adapters of a filled model to their start, as training does; within the fake mode."""
    if sharded:
        start_sharded(model, CPU)
    else:
        inject(model, adapter)


def mark_model(model: nn.Module, tracker: StepTracker) -> None:
    """Say what each tensor of a model is there for."""
    for module in model.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            tracker.mark([tensor], _part_of(module, name, tensor))


def shard_sizes(model: nn.Module) -> Breakdown:
    """Bytes of this rank's shares of the parameters; what is whole on every rank is not among them."""
    sizes = dict.fromkeys(Part, 0)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(parameter, DTensor):
                part = _part_of(module, name, parameter)
                sizes[part] += parameter.to_local().untyped_storage().nbytes()
    return Breakdown.of(sizes)


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers that follow one another, first to last; none for a decoder of another make."""
    layers = getattr(model.get_decoder(), "layers", None)
    return list(layers) if isinstance(layers, nn.ModuleList) else []


def _part_of(module: nn.Module, name: str, tensor: torch.Tensor) -> Part:
    if tensor.requires_grad or isinstance(module, Magnitude | SharedPair):
        return Part.ADAPTERS
    if isinstance(module, NF4Weight) and name != "packed":
        return Part.STATISTICS
    return Part.WEIGHTS if isinstance(tensor, nn.Parameter) else Part.OTHER


def _local_shape(parameter: nn.Parameter) -> torch.Size:
    if not isinstance(parameter, DTensor):
        return parameter.shape
    mesh = parameter.device_mesh
    rows = Share(mesh.get_local_rank(), mesh.size()).rows(parameter.shape[0])
    return torch.Size((rows.stop - rows.start, *parameter.shape[1:]))


K = TypeVar("K")

DEPTHS = (4, 5)
"""Two layers at each end see what no others do: nothing gathered before them, nothing to gather after."""


@dataclass(frozen=True)
class Architecture:
    """A base model as far as memory goes.

    Attributes:
        config: its transformers configuration.
        compute: dtype that it computes in.
        stored: dtype of the weights in its checkpoint.
        quantization: of the decoder's linear layers; None leaves them as stored.
    """

    config: PreTrainedConfig
    compute: torch.dtype
    stored: torch.dtype
    quantization: Quantization | None

    @property
    def depth(self) -> int:
        """Decoder layers."""
        return int(self.config.get_text_config().num_hidden_layers)

    def skeleton(self, depth: int | None = None) -> PreTrainedModel:
        """The structure on the meta device, with so many decoder layers; with all where None.

        Raises: InputError: not a causal language model, or one with layers that NF4 cannot hold.
        """
        config = copy.deepcopy(self.config)
        if depth is not None:
            text = config.get_text_config()
            text.num_hidden_layers = depth
            if getattr(text, "layer_types", None):
                text.layer_types = text.layer_types[:depth]
        return architecture_skeleton(config, self.compute, self.quantization, self.stored)


def record(architecture: Architecture, launch: Launch) -> StepRecord:
    """A step of the whole model, from two shallow ones where its layers are alike.

    Raises: InputError: as `record_step`.
    """
    if architecture.depth <= max(DEPTHS) or not layers_alike(architecture, launch.adapter):
        return record_step(architecture.skeleton(), launch)
    first, second = (record_step(architecture.skeleton(depth), launch) for depth in DEPTHS)
    return _extended(first, second, architecture.depth)


def layers_alike(architecture: Architecture, adapter: AdapterConfig) -> bool:
    """Whether every decoder layer has the same tensors, and the same adapters on them.

    Raises: InputError: the adapter does not fit the model.
    """
    kinds = getattr(architecture.config.get_text_config(), "layer_types", None) or ()
    model = architecture.skeleton()
    inject(model, adapter)
    signatures = [_signature(layer) for layer in decoder_layers(model)]
    same = len(signatures) == architecture.depth and all(s == signatures[0] for s in signatures)
    return same and len(set(kinds)) < 2


def _signature(layer: nn.Module) -> list[tuple[object, ...]]:
    tensors = [*layer.named_parameters(), *layer.named_buffers()]
    return [(name, tuple(t.shape), t.dtype, t.requires_grad) for name, t in tensors]


def _extended(first: StepRecord, second: StepRecord, depth: int) -> StepRecord:
    """To `depth` layers; the second record is a layer deeper, and may have stretches of that layer alone."""
    peaks = {
        stretch: Breakdown.of(_line(dict(peak), dict(second.peaks[stretch]), depth))
        for stretch, peak in first.peaks.items()
    }
    at_rest = Breakdown.of(_line(dict(first.at_rest), dict(second.at_rest), depth))
    shards = Breakdown.of(_line(dict(first.shards), dict(second.shards), depth))
    return StepRecord(peaks, at_rest, shards, _line(first.exchanged, second.exchanged, depth))


def _line(first: Mapping[K, int], second: Mapping[K, int], depth: int) -> dict[K, int]:
    return {key: value + (second[key] - value) * (depth - DEPTHS[0]) for key, value in first.items()}
