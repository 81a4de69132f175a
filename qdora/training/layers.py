"""How a decoder layer computes in a training step: compiled, recomputed in backward, its input offloaded.

None of it changes what a layer computes, and none is in place outside of training.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from pathlib import Path
from shutil import which
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from qdora.config import TrainingConfig
from qdora.distributed.launch import FsdpSettings
from qdora.errors import InputError, not_installed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Forward = Callable[..., Any]


def check_layer_settings(config: TrainingConfig, device: torch.device) -> None:
    """Refuse what a device cannot do, before a weight is read.

    Raises: InputError: activations offloaded from a CPU to itself, or no compiler for compiled layers.
    """
    if config.offload_activations and device.type == "cpu":
        raise InputError(
            "training.offload_activations moves activations to CPU memory, where a run on the CPU has them "
            "already; allowed here: false"
        )
    lacking = _missing_for_compile(device) if config.compile else None
    if lacking:
        raise InputError(
            f"training.compile writes code for the {device.type.upper()} and needs {lacking}, which is not "
            f"there; install it, or set training.compile: false"
        )


def _missing_for_compile(device: torch.device) -> str | None:
    """What torch's or Triton's code generator needs on a device and does not find; None where it has all."""
    if device.type == "cuda":
        # Triton compiles the code by which Python launches a kernel.
        if not_installed("triton"):
            return 'Triton (pip install "qdora[gpu]")'
        own = os.environ.get("CC")
        found = which(own) if own else which("gcc") or which("clang")
        compiler = f"the C compiler {own!r} (CC)" if own else "a C compiler, gcc or clang"
    else:
        own = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
        found, compiler = which(own), f"the C++ compiler {own!r} (CXX)"
    if found is None:
        return compiler
    header = Path(sysconfig.get_path("include"), "Python.h")
    return None if header.is_file() else f"Python's headers ({header})"


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers that follow one another, first to last; none for a decoder of another make."""
    layers = getattr(model.get_decoder(), "layers", None)
    return list(layers) if isinstance(layers, nn.ModuleList) else []


def prepare_layers(
    model: PreTrainedModel, config: TrainingConfig, fsdp: FsdpSettings | None, device: torch.device
) -> None:
    """Let decoder layers compute as configured while the model trains; in place of what an earlier call set.

    Args:
        device: of the activations.
    Raises: InputError: a decoder whose layers are not known.
    """
    recomputed = config.gradient_checkpointing or bool(fsdp and fsdp.activation_checkpointing)
    layers = decoder_layers(model)
    if not layers and (recomputed or config.compile):
        key = "compile" if config.compile else "gradient_checkpointing"
        raise InputError(
            f"training.{key}: the layers of a {type(model).__name__} are not known; allowed: false"
        )
    for i, layer in enumerate(layers):
        # The hooks by which FSDP gathers and frees a layer are around its `forward`, and so run once.
        forward: Forward = MethodType(type(layer).forward, layer)
        vars(layer).pop("forward", None)
        prepared = forward
        if config.compile:
            prepared = _compiled(prepared)
        if recomputed and i % config.checkpoint_every == 0:
            prepared = _recomputed(prepared, device if config.offload_activations else None)
        if prepared is not forward:
            layer.forward = _in_training(layer, forward, prepared)


def _compiled(forward: Forward) -> Forward:
    """One graph for batches of all sizes, of which those of the layer are constants."""
    from torch._dynamo import maybe_mark_dynamic  # a second and more to import

    compiled = torch.compile(forward, fullgraph=True)

    @wraps(forward)
    def inner(*args: Any, **kwargs: Any) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                # (B, T, features) of hidden states and rotations, (B, T) of positions, (B, 1, T, T) of masks.
                sides = range(2) if tensor.dim() == 3 else range(tensor.dim())
                maybe_mark_dynamic(tensor, [i for i in sides if tensor.shape[i] > 1])
        return compiled(*args, **kwargs)

    return inner


def _recomputed(forward: Forward, offload_from: torch.device | None) -> Forward:
    """Keep a layer's input alone, in CPU memory where it is offloaded, and compute the rest in backward."""

    @wraps(forward)
    def inner(*args: Any, **kwargs: Any) -> Any:
        context: AbstractContextManager[Any] = nullcontext()
        if offload_from is not None:
            context = save_on_cpu(pin_memory=offload_from.type != "cpu", device_type=offload_from.type)
        with context:
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return inner


def _in_training(layer: nn.Module, evaluated: Forward, trained: Forward) -> Forward:
    """A layer's `forward` that is one thing in training and another elsewhere."""

    @wraps(evaluated)
    def forward(*args: Any, **kwargs: Any) -> Any:
        trains = layer.training and torch.is_grad_enabled()
        return (trained if trains else evaluated)(*args, **kwargs)

    return forward
