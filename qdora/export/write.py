"""Merge the adapter into 16-bit weights and write a model folder that transformers and vLLM load."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from copy import deepcopy
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qdora.adapters.inject import adapted_layers
from qdora.adapters.layer import AdaptedLinear
from qdora.errors import InputError
from qdora.files import atomic_directory
from qdora.models.formats.safetensors import cast_checked, write_model_folder
from qdora.quant.dense import DenseWeight

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}

_HINT = "; export with --dtype bf16"


def merge_and_export(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    directory: str | Path,
    dtype: str = "fp16",
    *,
    tensors: Iterable[tuple[str, torch.Tensor]] | None = None,
    overwrite: bool = False,
) -> Path:
    """Merge the adapter and write a complete model folder atomically.

    Args:
        model: from `load_base`, with an adapter.
        tokenizer: saved with it where there is one.
        directory: must not exist, or be empty, unless `overwrite`.
        dtype: `fp16` or `bf16`.
        tensors: what to write instead of the model's own merged tensors.
        overwrite: replace the folder.
    Returns: the folder.
    Raises: InputError: unknown dtype, the folder is in use, no space left, or a value beyond
        the dtype's range.
    """
    directory = Path(directory)
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r}; allowed: {', '.join(DTYPES)}")
    if directory.exists() and not overwrite and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(f"{directory}: already exists and is not empty; choose another or pass --overwrite")
    config = deepcopy(model.config)
    config.architectures = [type(model).__name__]
    with atomic_directory(directory) as folder:
        write_model_folder(
            folder,
            merged_tensors(model, DTYPES[dtype]) if tensors is None else tensors,
            config,
            DTYPES[dtype],
            model.generation_config if model.can_generate() else None,
            tokenizer,
        )
    return directory


def merged_tensors(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's tensors under transformers' names, adapters merged onto the weights they were trained on.

    Only the tensor that was yielded last exists in full.

    Args:
        model: from `load_base`, with or without an adapter.
        dtype: of every tensor.
    Raises: InputError: a value does not fit `dtype`; the tensor is named.
    """
    seen: set[int] = set()
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside):
            continue
        if isinstance(module, AdaptedLinear):
            inside = (f"{name}.",)
            if any(id(parameter) in seen for parameter in module.base.parameters()):
                continue  # an output layer that is tied to the embedding
            yield f"{name}.weight", cast_checked(f"{name}.weight", module.merged(torch.float32), dtype, _HINT)
            if module.bias is not None:
                yield f"{name}.bias", cast_checked(f"{name}.bias", module.bias, dtype, _HINT)
            continue
        for leaf, tensor in _own_tensors(module):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                full = f"{name}.{leaf}" if name else leaf
                yield full, cast_checked(full, tensor, dtype, _HINT)


def merged_onto(
    model: PreTrainedModel, originals: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of the unquantized checkpoint, one at a time, with the adapter merged onto them.

    The magnitude is divided by the norm of the original weight plus the update.

    Args:
        model: carries the adapter.
        originals: names and tensors.
        dtype: of every tensor.
    Raises: InputError: a value does not fit `dtype`; the tensor is named.
    """
    layers = adapted_layers(model)
    for name, tensor in originals:
        layer = layers.get(name.removesuffix(".weight"))
        if layer is not None and name.endswith(".weight"):
            tensor = layer.merged(torch.float32, onto=DenseWeight(tensor))
        yield name, cast_checked(name, tensor, dtype, _HINT)


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers of a module itself."""
    yield from module.named_parameters(recurse=False)
    for leaf, buffer in module.named_buffers(recurse=False):
        if leaf not in module._non_persistent_buffers_set:
            yield leaf, buffer
