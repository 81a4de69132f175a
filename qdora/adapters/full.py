"""Full fine-tuning: the model itself is what was trained.  Its tensors, saved and put back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from qdora.adapters.inject import (
    FULL_METHOD,
    FULL_STORAGE,
    InjectionReport,
    compute_dtype,
    count_parameters,
    linear_layers,
)
from qdora.adapters.linear import AdaptedLinear
from qdora.adapters.methods import METHODS
from qdora.adapters.whole import whole
from qdora.config import Method
from qdora.errors import InputError
from qdora.quant.dense import DenseWeight
from qdora.quant.nf4 import NF4Weight


def full_method(model: nn.Module) -> Method | None:
    """`full` or `full-nf4` where `inject` made every parameter trainable; None for any other model."""
    method: Method | None = getattr(model, FULL_METHOD, None)
    return method


def full_tensors(model: nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    """Every parameter under its name in transformers, after a prefix; a tied one once.

    Where they are sharded, every process must ask at the same time.
    """
    storage: torch.dtype = getattr(model, FULL_STORAGE)
    return {
        prefix + name: whole(parameter, storage).cpu().contiguous() for name, parameter in _parameters(model)
    }


def load_full(
    model: nn.Module, tensors: Mapping[str, torch.Tensor], method: Method, origin: str
) -> InjectionReport:
    """Put trained parameters in place of a model's own, and quantize them where the method says so.

    Args:
        model: of the same architecture, its linear layers not quantized.
        tensors: by transformers' names.
        method: `full`, or `full-nf4`: linear layers but the output layer become NF4 in blocks of 64,
            doubly quantized.
        origin: named in errors.
    Raises: InputError: other parameters or shapes than the model's, or its base is quantized.
    """
    own = dict(_parameters(model))
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
    compute = compute_dtype(model)
    for name, tensor in tensors.items():
        own[name].data = tensor.to(own[name].device, compute)  # not rounded to the base's 16 bits
    if METHODS[method].result == "nf4":
        _quantize(model)
    total = count_parameters(model)
    return InjectionReport((), (), total, total)


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    layers = linear_layers(model)
    for name, parameter in model.named_parameters():
        full = name.removesuffix(".base.weight")
        yield (f"{full}.weight" if isinstance(layers.get(full), AdaptedLinear) else name), parameter


def _quantize(model: nn.Module) -> None:
    output = getattr(model, "get_output_embeddings", lambda: None)()
    for name, layer in linear_layers(model).items():
        if layer is output:
            continue
        if isinstance(layer, AdaptedLinear):
            assert isinstance(layer.base, DenseWeight)
            w_OI = layer.base.weight.detach()
        else:
            w_OI = layer.weight.detach()
        try:
            quantized = NF4Weight.quantize(w_OI)
        except ValueError as error:
            raise InputError(f"{name}: {error}") from None
        model.set_submodule(name, AdaptedLinear(quantized, layer.bias))
