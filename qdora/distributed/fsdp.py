"""Shard a model over the ranks with FSDP2 before it has weights, and compute and generate with it.

The model is built and sharded on the meta device; then each rank loads its shards, and never holds more.  The
model does not know that it is sharded, and nothing here knows how a weight is quantized.

Source: PyTorch FSDP, arXiv:2304.11277; `torch.distributed.fsdp.fully_shard`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from qdora.adapters.base import AdapterModule, SharedBuffers, adapter_parameter, local_rows_of
from qdora.adapters.inject import adapted_layers
from qdora.adapters.layer import AdaptedLinear
from qdora.distributed.context import DistributedContext
from qdora.distributed.launch import FsdpSettings
from qdora.errors import InputError, suggest
from qdora.quant.base import FrozenWeight
from qdora.resources import available_memory, release_freed_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def shard_model(model: PreTrainedModel, context: DistributedContext) -> None:
    """Shard a model on the meta device, adapters included, in place; without FSDP there is nothing to do.

    Each decoder layer is an FSDP unit; so are an untied embedding and an untied output layer.
    Frozen vectors are replicated on every rank: they are a few kilobytes of gigabytes.  A trained parameter's
    shard is float32, the optimizer's master; its gather rounds it to the dtype in which it is stored, and
    its gradient is summed, not averaged, over the ranks in float32.

    Raises: InputError: the settings name a layer class that the model does not have, or an adapter starts
        from full weights.
    """
    if context.fsdp is None:
        return
    for name, layer in adapted_layers(model).items():
        if layer.update is not None and layer.update.sees_weight:
            raise InputError(
                f"adapter.init: the update of {name} is made of the full weight, "
                f"which no rank has under FSDP; allowed there: kaiming, gaussian, gaussian_sqrt, orthogonal"
            )
    mesh, settings = context.mesh, context.fsdp
    assert mesh is not None
    storage = _widen_trained(model)
    replicated = set(frozen_vectors(model))
    policy = MixedPrecisionPolicy(param_dtype=storage, reduce_dtype=torch.float32, cast_forward_inputs=False)
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if settings.offload else OffloadPolicy()
    with integer_shards():
        for module in [*_gathered_modules(model, settings), model]:
            fully_shard(
                module,
                mesh=mesh,
                # The root's is gathered once: what it holds is needed first and last.
                reshard_after_forward=None if module is model else settings.reshard_after_forward,
                mp_policy=policy,
                offload_policy=offload,
                ignored_params=replicated,
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


class IntegersTakeNoGradients(TorchFunctionMode):
    """Within it, a tensor of integers stays without gradients when it is asked to require them."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.requires_grad_ and not args[0].is_floating_point():
            return args[0]
        return func(*args, **kwargs or {})


def integer_shards() -> AbstractContextManager[Any]:
    """Context manager in which `fully_shard` takes parameters of integers, packed codes.

    torch before 2.12 lets each shard require gradients before it asks whether the parameter does.
    """
    return IntegersTakeNoGradients() if torch.__version__ < "2.12" else nullcontext()


def reset_adapters(model: PreTrainedModel, context: DistributedContext) -> None:
    """Bring the adapters of a model whose weights are loaded to their initial values, each rank its shards.

    What is still on the meta device is materialized.  Row norms are taken of each layer's full weight,
    gathered for the moment: bit for bit those of a process alone.
    """
    for module in model.modules():
        if isinstance(module, SharedBuffers) and module.is_meta:
            module.materialize(context.device)
        elif isinstance(module, AdapterModule):
            _materialize(module, context)
    layers = list(adapted_layers(model).values())
    if context.fsdp is not None:
        for layer in layers:
            layer.watch_stored()
    for of_group in _full_weights(model, layers):
        for layer in of_group:
            layer.reset_from_weight()


def _materialize(module: AdapterModule, context: DistributedContext) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        value = module.initial(name).to(module.storage)
        if isinstance(parameter, DTensor):
            local = local_rows_of(parameter, value.float()).to(context.storage_device, copy=True)
            module.register_parameter(name, nn.Parameter(shard_like(parameter, local)))
        else:
            module.register_parameter(name, adapter_parameter(value.to(context.device)))


def _full_weights(model: nn.Module, layers: list[AdaptedLinear]) -> Iterator[list[AdaptedLinear]]:
    """The layers in groups, each while the weights of its layers are gathered; all at once without FSDP."""
    groups = sharded_modules(model)
    if not groups:
        yield layers
        return
    owner: dict[nn.Module, FSDPModule] = {}
    for group in reversed(groups):  # inner ones first: they win
        for module in cast(nn.Module, group).modules():
            owner.setdefault(module, group)
    for group in groups:
        own = [layer for layer in layers if owner[layer] is group]
        if own:
            group.unshard()
            yield own
            group.reshard()
            release_freed_memory()


def sharded_modules(model: nn.Module) -> list[FSDPModule]:
    """The FSDP units, the root first."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _gathered_modules(model: PreTrainedModel, settings: FsdpSettings) -> list[nn.Module]:
    """The FSDP units below the root: modules whose parameters are gathered in one collective."""
    if not settings.wrap:
        return []
    classes = {type(module).__name__ for module in model.modules()}
    wanted = settings.layer_classes or tuple(model._no_split_modules or ())
    for name in settings.layer_classes:
        if name not in classes:
            raise InputError(
                f"fsdp_transformer_layer_cls_to_wrap: {name!r} is no layer of a {type(model).__name__}; "
                f"{suggest(name, classes)}"
            )
    layers = [module for module in model.modules() if type(module).__name__ in wanted]
    if model.config.get_text_config().tie_word_embeddings:
        return layers
    return [*layers, model.get_input_embeddings(), model.get_output_embeddings()]


def frozen_vectors(model: nn.Module) -> Iterator[nn.Parameter]:
    """Norm weights and biases, not the statistics of a quantized weight: replicated on every rank."""
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.dim() < 2 and not parameter.requires_grad and not isinstance(module, FrozenWeight):
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
    for group in parameter_groups(sharded):
        for parameter in group.fsdp_params:
            if not parameter.sharded_param.requires_grad:
                parameter.init_dtype_attrs = partial(
                    lambda initialize, policy: initialize(replace(policy, param_dtype=None)),
                    parameter.init_dtype_attrs,
                )


def parameter_groups(module: FSDPModule) -> list[Any]:
    """torch's private objects that gather the parameters of an FSDP unit, one a collective."""
    state: Any = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [state._fsdp_param_group] if state._fsdp_param_group else []  # torch 2.11 has at most one


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

        def call(model: nn.Module, *args: Any, **kwargs: Any) -> T:
            take_wide_gradients(model)  # of the root's own parameters: hooks run around `forward` alone
            return function(model, *args, **kwargs)

        object.__setattr__(model, name, MethodType(call, model))
        register_fsdp_forward_method(model, name)
    method: Callable[..., T] = getattr(model, name)
    return method


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


def shard_like(old: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """A rank's rows as what they are in the model: the local shard of a DTensor, or the tensor itself.

    Args:
        old: the parameter that they replace.
        local: its rows of this rank, where they are to be kept.
    """
    if not isinstance(old, DTensor):
        return local
    if local.device.type == old.device_mesh.device_type:
        return DTensor.from_local(
            local, old.device_mesh, old.placements, run_check=False, shape=old.shape, stride=old.stride()
        )
    # `from_local` would move it to the mesh's device.
    shard = torch.empty_like(old, device=local.device)
    assert isinstance(shard, DTensor)
    with torch.no_grad():
        shard.to_local().copy_(local)
    return shard


MARGIN = 0.8
"""Fraction of the free memory that a complete copy and its key-value cache may take."""


@contextmanager
def for_generation(model: PreTrainedModel, context: DistributedContext, tokens: int) -> Iterator[bool]:
    """Keep what a first pass gathers, where every rank has room for it, until the block ends.

    Args:
        tokens: prompts and answers that are in memory at one time, for the key-value cache.
    Yields: whether the ranks must call the model equally often: it stays sharded.
    """
    if not isinstance(model, FSDPModule):
        yield False
        return
    shards = [p for p in model.parameters() if isinstance(p, DTensor)]
    needed = sum(p.numel() * p.dtype.itemsize for p in shards) + tokens * cache_bytes(model)
    fits = all(context.gather([needed <= MARGIN * free_memory(context.device)]))
    settings = context.fsdp
    assert settings is not None
    groups = sharded_modules(model)[1:]
    for group in groups:
        group.set_reshard_after_forward(settings.reshard_after_forward and not fits, recurse=False)
    try:
        yield not fits
    finally:
        for group in groups:
            group.set_reshard_after_forward(settings.reshard_after_forward, recurse=False)
            group.reshard()
        model.reshard()


def cache_bytes(model: PreTrainedModel) -> int:
    """Bytes of one token's keys and values in all layers."""
    text = model.config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return int(2 * text.num_hidden_layers * heads * head * torch.float32.itemsize)


def free_memory(device: torch.device) -> int:
    """Bytes that this rank may still take, the others on the machine taking as much."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + unused)
    return available_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
