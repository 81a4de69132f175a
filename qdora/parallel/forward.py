"""Use a sharded model in other ways than by its `forward`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

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
