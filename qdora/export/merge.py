"""The tensors of a model with its adapter merged in, one at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from qdora.adapters.inject import adapted_layers
from qdora.adapters.linear import AdaptedLinear
from qdora.errors import InputError
from qdora.quant.dense import DenseWeight


def merged_tensors(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's tensors under transformers' names, adapters merged onto the weights they were trained on.

    Only the tensor that is handed out exists in full.

    Args:
        model: from `load_base`, with or without an adapter.
        dtype: of every tensor that comes out.
    Raises: InputError: a value does not fit into `dtype`; the tensor is named.
    """
    seen: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLinear):
            if isinstance(module.base, DenseWeight) and id(module.base.weight) in seen:
                continue  # the output layer that shares the embedding
            yield f"{name}.weight", _fitting(f"{name}.weight", module.merged(torch.float32), dtype)
            if module.bias is not None:
                yield f"{name}.bias", _fitting(f"{name}.bias", module.bias, dtype)
            continue
        for leaf, tensor in _own_tensors(module):
            if "." in name and isinstance(model.get_submodule(name.rpartition(".")[0]), AdaptedLinear):
                continue
            seen.add(id(tensor))
            full = f"{name}.{leaf}" if name else leaf
            yield full, _fitting(full, tensor, dtype)


def merged_onto(
    model: PreTrainedModel, originals: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """The original tensors, streamed, with the adapter merged onto them.

    The magnitude is divided by the norm of the original weight plus the update.

    Args:
        model: carries the adapter.
        originals: names and tensors of the unquantized checkpoint.
        dtype: of every tensor that comes out.
    Raises: InputError: a value does not fit into `dtype`; the tensor is named.
    """
    layers = adapted_layers(model)
    for name, tensor in originals:
        layer = layers.get(name.removesuffix(".weight"))
        if layer is not None and name.endswith(".weight"):
            tensor = layer.merged(torch.float32, onto=DenseWeight(tensor))
        yield name, _fitting(name, tensor, dtype)


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(recurse=False)
    for leaf, buffer in module.named_buffers(recurse=False):
        if leaf not in module._non_persistent_buffers_set:
            yield leaf, buffer


def _fitting(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    tensor = tensor.detach()
    cast = tensor.to("cpu", dtype)
    if not torch.isfinite(cast).all():
        largest = float(tensor.float().abs().max())
        raise InputError(
            f"{name}: a value of magnitude {largest:g} does not fit into {dtype}, whose largest is "
            f"{torch.finfo(dtype).max:g}; export with --dtype bf16"
        )
    return cast.contiguous()
