"""Full fine-tuning: the model itself is what is trained.  Its tensors, saved, loaded and quantized."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import reduce

import torch
from torch import nn

from qdora.adapters.base import AdapterModule, full_tensor
from qdora.adapters.inject import (
    InjectionReport,
    count_parameters,
    decoder_linears,
    linear_layers,
)
from qdora.adapters.layer import AdaptedLinear
from qdora.errors import InputError
from qdora.quant import Quantization

_STORAGE = "_qdora_full_storage"
"""Attribute of a fully trained model: dtype of its parameters where they are not sharded."""


def train_everything(model: nn.Module) -> InjectionReport:
    """Make every parameter trainable, in the dtype that the model computes in.

    Where 16-bit matrices are widened for each product anyway, a float32 parameter that is its own
    master takes less memory than a 16-bit one beside its master.

    Raises: InputError: a weight is quantized.
    """
    for name, layer in linear_layers(model).items():
        if isinstance(layer, AdaptedLinear) and layer.base.quantization != "none":
            raise InputError(
                f"training every weight needs an unquantized base, {name} is {layer.base.quantization}; "
                f"load the model with quantization='none'"
            )
    compute = compute_dtype_of(model)
    object.__setattr__(model, _STORAGE, compute)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(compute)
        parameter.requires_grad_(True)
        parameter.grad_dtype = torch.promote_types(compute, torch.float32)
    return full_report(model)


def full_report(model: nn.Module) -> InjectionReport:
    """The report of a model of which every parameter is trained."""
    total = count_parameters(model)
    return InjectionReport((), (), total, total)


def compute_dtype_of(model: nn.Module) -> torch.dtype:
    """What an unquantized model computes in: its widest dtype, since its vectors are never narrower."""
    return reduce(torch.promote_types, (parameter.dtype for parameter in model.parameters()))


def trained_storage(model: nn.Module) -> torch.dtype | None:
    """Dtype of what is trained where it is not sharded, the same for all of it; None where nothing is."""
    adapters = (module.storage for module in model.modules() if isinstance(module, AdapterModule))
    return getattr(model, _STORAGE, None) or next(adapters, None)


def is_fully_trained(model: nn.Module) -> bool:
    """Whether `train_everything` made every parameter trainable."""
    return hasattr(model, _STORAGE)


def full_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter under its name in transformers; a tied one once.  A collective under FSDP."""
    storage: torch.dtype = getattr(model, _STORAGE)
    return {name: full_tensor(p, storage).cpu().contiguous() for name, p in _named_parameters(model)}


def load_full(model: nn.Module, tensors: Mapping[str, torch.Tensor], origin: str) -> None:
    """Replace a model's parameters by trained ones.

    Args:
        model: of the same architecture, its linear layers not quantized.
        tensors: by transformers' names.
        origin: named in errors.
    Raises: InputError: other parameters or shapes than the model's, or its base is quantized.
    """
    own = dict(_named_parameters(model))
    if own.keys() != tensors.keys():
        odd = sorted(own.keys() ^ tensors.keys())
        raise InputError(
            f"{origin}: made for another base, or for one that is not quantized: {', '.join(odd[:3])}"
        )
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise InputError(
                f"{origin}: the weights were made for another base: {name} has shape "
                f"{tuple(tensor.shape)}, expected {tuple(own[name].shape)}"
            )
    compute = compute_dtype_of(model)
    for name, tensor in tensors.items():
        own[name].data = tensor.to(own[name].device, compute)  # not rounded to the base's 16 bits


def quantize_layers(model: nn.Module, quantization: Quantization) -> None:
    """Quantize the linear layers of an unquantized model but the output layer, in place.

    Raises: InputError: the format cannot hold a layer's shape.
    """
    for name, layer in decoder_linears(model).items():
        w_OI = layer.base.dense() if isinstance(layer, AdaptedLinear) else layer.weight.detach()
        try:
            quantized = quantization.from_dense(w_OI)
        except ValueError as error:
            raise InputError(f"{name}: {error}") from None
        model.set_submodule(name, AdaptedLinear(quantized, layer.bias))


def _named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    layers = linear_layers(model)
    for name, parameter in model.named_parameters():
        full = name.removesuffix(".base.weight")
        yield (f"{full}.weight" if isinstance(layers.get(full), AdaptedLinear) else name), parameter
