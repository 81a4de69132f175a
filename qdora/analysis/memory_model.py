"""A model of a given architecture on fake tensors: every shape, dtype and share, and not one value."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from qdora.adapters.direction import SharedPair
from qdora.adapters.inject import inject
from qdora.adapters.magnitude import Magnitude
from qdora.analysis.memory_fakes import CPU
from qdora.analysis.memory_parts import Breakdown, Part
from qdora.analysis.memory_tracker import StepTracker
from qdora.config import AdapterConfig
from qdora.models.fill import replace_parameter, shard_like
from qdora.parallel.launch_settings import FsdpSettings
from qdora.parallel.shard import shard_model, start_sharded
from qdora.quant.nf4 import NF4Weight
from qdora.quant.share import Share


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
