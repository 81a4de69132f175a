"""Write a model folder that plain transformers and vLLM load: sharded safetensors and JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from copy import deepcopy
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qdora.adapters.inject import adapted_layers
from qdora.adapters.layer import AdaptedLinear
from qdora.errors import InputError
from qdora.files import new_directory
from qdora.quant.dense import DenseWeight

SHARD_BYTES = 512 << 20
"""A shard is collected in memory before it is written, so this bounds the memory of an export."""

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def merge_and_export(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    directory: str | Path,
    dtype: str = "fp16",
    *,
    tensors: Iterable[tuple[str, torch.Tensor]] | None = None,
    overwrite: bool = False,
) -> Path:
    """Merge the adapter and write a complete model folder, whole or not at all.

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
    with new_directory(directory) as folder:
        write_shards(merged_tensors(model, DTYPES[dtype]) if tensors is None else tensors, folder)
        config = deepcopy(model.config)
        config.dtype = DTYPES[dtype]
        config.architectures = [type(model).__name__]
        config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return directory


def write_shards(tensors: Iterable[tuple[str, torch.Tensor]], folder: Path) -> None:
    """Write tensors, in their order, as model.safetensors or as shards with an index."""
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    total = size = 0
    for name, tensor in tensors:
        if pending and size + tensor.nbytes > SHARD_BYTES:
            shards.append(_write_shard(pending, folder, len(shards)))
            pending, size = {}, 0
        pending[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    shards.append(_write_shard(pending, folder, len(shards)))
    if len(shards) == 1:
        _part(folder, 0).rename(folder / "model.safetensors")
        return
    weight_map = {}
    for number, names in enumerate(shards):
        final = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        _part(folder, number).rename(folder / final)
        weight_map.update(dict.fromkeys(names, final))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_shard(tensors: dict[str, torch.Tensor], folder: Path, number: int) -> list[str]:
    save_file(tensors, _part(folder, number), {"format": "pt"})
    return list(tensors)


def _part(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05d}.safetensors"


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
            yield f"{name}.weight", _fitting(f"{name}.weight", module.merged(torch.float32), dtype)
            if module.bias is not None:
                yield f"{name}.bias", _fitting(f"{name}.bias", module.bias, dtype)
            continue
        for leaf, tensor in _own_tensors(module):
            if id(tensor) in seen:
                continue  # the output layer that shares the embedding
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
