"""Shard a model over the ranks with FSDP2, before it has any weights.

The model is built on the meta device, sharded there, and then each rank fills in its own rows: no rank ever
holds more than its share.  The model does not know; nothing here knows what is quantized, but for the names
of the statistics.

Source: PyTorch FSDP, arXiv:2304.11277; `torch.distributed.fsdp.fully_shard`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import MethodType
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from qdora.adapters.direction import LowRank, SharedPair, Vera
from qdora.adapters.inject import adapted_layers
from qdora.adapters.magnitude import Magnitude
from qdora.adapters.whole import own_rows
from qdora.distributed.launch import FsdpSettings
from qdora.errors import InputError, suggest
from qdora.memory import release_freed_memory
from qdora.quant.nf4 import NF4Weight


def shard_model(model: PreTrainedModel, mesh: DeviceMesh, settings: FsdpSettings) -> None:
    """Shard a model whose parameters are on the meta device, adapters included, in place.

    Each decoder layer is gathered as a whole, an untied embedding and an untied output layer by themselves.
    Frozen vectors stay whole on every rank: they are a few kilobytes of gigabytes.  A trained parameter's
    shard is float32, the optimizer's master; its gather rounds it to the dtype in which it is stored, and
    its gradient is summed, not averaged, over the ranks in float32.

    Args:
        mesh: one dimension, all ranks.
    Raises: InputError: the settings name a layer class that the model does not have.
    """
    storage = _widen_trained(model)
    frozen_vectors = set(_frozen_vectors(model))
    policy = MixedPrecisionPolicy(param_dtype=storage, reduce_dtype=torch.float32, cast_forward_inputs=False)
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if settings.offload else OffloadPolicy()
    for module in [*_groups(model, settings), model]:
        fully_shard(
            module,
            mesh=mesh,
            # The root's is gathered once: what it holds is needed first and last.
            reshard_after_forward=None if module is model else settings.reshard_after_forward,
            mp_policy=policy,
            offload_policy=offload,
            ignored_params=frozen_vectors,
        )
    for sharded in sharded_modules(model):
        _keep_frozen_dtypes(sharded)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
        cast(nn.Module, sharded).register_forward_pre_hook(take_wide_gradients)
    embedding = model.get_input_embeddings()
    if isinstance(embedding, FSDPModule):
        # The gradient of a table needs no table; it would be gathered ahead of backward for nothing.
        embedding.set_unshard_in_backward(False)


def start_sharded(model: PreTrainedModel, device: torch.device, storage: torch.device | None = None) -> None:
    """Start the adapters of a sharded model whose weights are there, each rank its own rows.

    Args:
        device: where the model computes.
        storage: device of the shards, where another.
    """
    for module in model.modules():
        if isinstance(module, SharedPair) and module.a_RI.is_meta:
            module.draw(device)
    for module in model.modules():
        if not isinstance(module, LowRank | Vera | Magnitude):
            continue
        for name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor):
                rounded = module.initial(name).to(module.storage).float()
                own = own_rows(parameter, rounded).to(storage or device, copy=True)
                shard = shard_like(parameter, own, storage)
                module.register_parameter(name, nn.Parameter(shard))
    for layer in adapted_layers(model).values():
        layer.watch_stored()
    _start_norms(model)


def sharded_modules(model: nn.Module) -> list[FSDPModule]:
    """The modules that are gathered each as a whole, the root first."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@torch.no_grad()
def _start_norms(model: PreTrainedModel) -> None:
    """Row norms of each layer's whole weight, gathered for the moment: bit for bit those of one process."""
    groups = sharded_modules(model)
    owner: dict[nn.Module, FSDPModule] = {}
    for group in reversed(groups):  # inner ones first: they win
        for module in cast(nn.Module, group).modules():
            owner.setdefault(module, group)
    for group in groups:
        layers = [layer for layer in adapted_layers(model).values() if owner[layer] is group]
        if layers:
            group.unshard()
            for layer in layers:
                layer.start_norms()
            group.reshard()
            release_freed_memory()


def _groups(model: PreTrainedModel, settings: FsdpSettings) -> list[nn.Module]:
    """What is gathered as a whole, the root apart."""
    if not settings.wrap:
        return []
    classes = {type(module).__name__ for module in model.modules()}
    wanted = settings.layer_classes or tuple(model._no_split_modules or ())
    for name in wanted:
        if name not in classes and settings.layer_classes:
            raise InputError(
                f"fsdp_transformer_layer_cls_to_wrap: {name!r} is no layer of a {type(model).__name__}; "
                f"{suggest(name, classes)}"
            )
    layers = [module for module in model.modules() if type(module).__name__ in wanted]
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if model.config.get_text_config().tie_word_embeddings:
        return layers
    return [*layers, embedding, head]


def _frozen_vectors(model: nn.Module) -> Iterator[nn.Parameter]:
    """Norm weights and biases, not the statistics of a quantized weight."""
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.dim() < 2 and not parameter.requires_grad and not isinstance(module, NF4Weight):
                yield parameter


def _widen_trained(model: nn.Module) -> torch.dtype | None:
    """Make trained parameters float32 masters; the dtype that they had, None where none is trained."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    dtypes = {parameter.dtype for parameter in trained}
    assert len(dtypes) <= 1, "trained parameters of several dtypes"
    for parameter in trained:
        wide = nn.Parameter(torch.empty(parameter.shape, dtype=torch.float32, device="meta"))
        replace_parameter(model, parameter, wide)
    return next(iter(dtypes), None)


def _keep_frozen_dtypes(sharded: FSDPModule) -> None:
    """Gather frozen parameters as they are stored.

    FSDP knows one dtype a group.  The frozen ones among the trained must not be rounded to theirs: scales
    of NF4 blocks, 16-bit weights of another kind.
    """
    for group in sharded._get_fsdp_state()._fsdp_param_groups:
        for parameter in group.fsdp_params:
            if not parameter.sharded_param.requires_grad:
                initialize = parameter.init_dtype_attrs
                parameter.init_dtype_attrs = partial(_without_param_dtype, initialize)  # type: ignore[method-assign]


def _without_param_dtype(
    initialize: Callable[[MixedPrecisionPolicy], None], policy: MixedPrecisionPolicy
) -> None:
    initialize(replace(policy, param_dtype=None))


T = TypeVar("T")


def as_forward(model: nn.Module, function: Callable[..., T]) -> Callable[..., T]:
    """`function(model, ...)`, taken for a forward pass of the model where it is sharded.

    The root's parameters are gathered, and gradients collected, around the methods that FSDP knows.

    Args:
        function: takes the model first.
    """
    if not isinstance(model, FSDPModule):
        return partial(function, model)
    name = f"_qdora_{function.__name__.lstrip('_')}"
    if not hasattr(model, name):
        object.__setattr__(model, name, MethodType(_with_wide_gradients(function), model))
        register_fsdp_forward_method(model, name)
    method: Callable[..., T] = getattr(model, name)
    return method


def _with_wide_gradients(function: Callable[..., T]) -> Callable[..., T]:
    """For what the root holds itself: forward hooks run around `forward` alone."""

    def call(model: nn.Module, *args: Any, **kwargs: Any) -> T:
        take_wide_gradients(model)
        return function(model, *args, **kwargs)

    return call


@contextmanager
def gathered(module: nn.Module) -> Iterator[Callable[..., Any]]:
    """A module with all its parameters while it is applied several times.

    Yields: what applies it.  The module's own call would gather and free a sharded one each time.
    """
    if not isinstance(module, FSDPModule):
        yield module
        return
    module.unshard()
    take_wide_gradients(module)
    try:
        yield module.forward
    finally:
        module.reshard()


def take_wide_gradients(module: nn.Module, arguments: Any = None) -> None:
    """Let gathered parameters take float32 gradients, as the stored ones do: they are summed unrounded."""
    for parameter in module.parameters():
        if parameter.requires_grad and not isinstance(parameter, DTensor):
            parameter.grad_dtype = torch.float32


def replace_parameter(model: nn.Module, old: nn.Parameter, new: nn.Parameter) -> None:
    """Wherever a model holds a parameter: a tied one in two places."""
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is old:
                module._parameters[leaf] = new


def shard_like(old: torch.Tensor, own: torch.Tensor, storage: torch.device | None = None) -> torch.Tensor:
    """This process's rows as what they are in the model: a shard of a DTensor, or the tensor itself.

    Args:
        old: the parameter whose place they take.
        own: its local rows.
        storage: device of shards, where another than that of `own`.
    """
    if not isinstance(old, DTensor):
        return own
    if storage is None:
        return DTensor.from_local(
            own, old.device_mesh, old.placements, run_check=False, shape=old.shape, stride=old.stride()
        )
    # `from_local` would move it to the mesh's device.
    shard = torch.empty_like(old, device=storage)
    assert isinstance(shard, DTensor)
    with torch.no_grad():
        shard.to_local().copy_(own)
    return shard
