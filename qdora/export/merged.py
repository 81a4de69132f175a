"""`--format merged`: the adapter merged into 16-bit weights, a folder that transformers and vLLM load."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from qdora.adapters.inject import adapted_layers, refuse_overflow
from qdora.adapters.layer import AdaptedLinear
from qdora.adapters.tokens import TokenRows
from qdora.adapters.vocabulary import vocabulary_layers
from qdora.errors import InputError
from qdora.export.job import ExportJob
from qdora.export.verify import verify_export
from qdora.files import atomic_directory
from qdora.models.formats.write import cast_checked, write_model_folder
from qdora.output import check_output
from qdora.quant.dense import DenseWeight

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


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
        dtype: `fp16`, `bf16` or `fp32`.
        tensors: what to write instead of the model's own merged tensors.
        overwrite: replace the folder.
    Returns: the folder.
    Raises: InputError: unknown dtype, the folder is in use, no space left, or a value beyond
        the dtype's range.
    """
    directory = Path(directory)
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r}; allowed: {', '.join(DTYPES)}")
    check_output(directory, overwrite)
    refuse_overflow(model, "the model")
    with atomic_directory(directory) as folder:
        own = merged_tensors(model, DTYPES[dtype]) if tensors is None else tensors
        write_tensors(folder, model, tokenizer, DTYPES[dtype], own)
    return directory


def check(job: ExportJob) -> None:
    """As `Format.check`."""
    job.check_onto()


def write(job: ExportJob, folder: Path) -> str:
    """As `Format.write`."""
    dtype = DTYPES[job.options.dtype]
    refuse_overflow(job.model, "the model")
    write_tensors(folder, job.model, job.tokenizer, dtype, tensors_as_asked(job, dtype))
    return "merged weights"


def verify(job: ExportJob, folder: Path) -> str:
    """As `Format.verify`."""
    return str(verify_export(folder, model_as_asked(job)))


def tensors_as_asked(job: ExportJob, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """The merged tensors that `--onto` asks for, one at a time.

    Raises: InputError: there is no adapter to merge onto other weights; as `merged_tensors`.
    """
    if job.options.onto == "nf4":
        return merged_tensors(job.model, dtype)
    if not adapted_layers(job.model):
        raise InputError("--onto original: full fine-tuning leaves no adapter to merge onto other weights")
    return merged_onto(job.model, job.checkpoint.tensors(), dtype)


def model_as_asked(job: ExportJob) -> PreTrainedModel:
    """The adapted model that computes what the tensors of `--onto` do; the job's model may be released."""
    if job.options.onto == "nf4":
        return job.model
    job.release()
    return job.load(job.adapter, quantization="none")


def write_tensors(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    dtype: torch.dtype,
    tensors: Iterable[tuple[str, torch.Tensor]],
    quantization: Mapping[str, object] | None = None,
) -> None:
    """Write a model folder with the model's settings and other tensors.

    Args:
        quantization: what config.json says of quantized tensors.
    """
    config = deepcopy(model.config)
    config.architectures = [type(model).__name__]
    generation_config = model.generation_config if model.can_generate() else None
    write_model_folder(folder, tensors, config, dtype, generation_config, tokenizer, quantization)


def merged_tensors(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's tensors under transformers' names, adapters merged onto the weights they were trained on.

    Only the tensor that was yielded last exists in full.

    Args:
        model: from `load_base`, with or without an adapter.
        dtype: of every tensor.
    Raises: InputError: a value does not fit `dtype`; the tensor is named.
    """

    def merged(name: str, layer: AdaptedLinear) -> Iterator[tuple[str, torch.Tensor]]:
        yield f"{name}.weight", _cast(f"{name}.weight", layer.merged(torch.float32), dtype)

    return model_tensors(model, dtype, merged)


def model_tensors(
    model: PreTrainedModel,
    dtype: torch.dtype,
    layer_tensors: Callable[[str, AdaptedLinear], Iterable[tuple[str, torch.Tensor]]],
) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's tensors under transformers' names, the weights of linear layers as `layer_tensors` says.

    Args:
        dtype: of every other tensor.
        layer_tensors: from a layer and its full name, the tensors that its weight becomes.
    Raises: InputError: a value does not fit `dtype`; the tensor is named.
    """
    seen: set[int] = set()
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside) or isinstance(module, TokenRows):
            continue
        if isinstance(module, AdaptedLinear):
            inside = (f"{name}.",)
            if any(id(parameter) in seen for parameter in module.base.parameters()):
                continue  # an output layer that is tied to the embedding
            yield from layer_tensors(name, module)
            if module.bias is not None:
                yield f"{name}.bias", _cast(f"{name}.bias", module.bias, dtype)
            continue
        for leaf, tensor in _own_tensors(module):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                full = f"{name}.{leaf}" if name else leaf
                tensor = _with_rows(module, leaf, tensor)
                yield full, _cast(full, tensor, dtype)


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
    layers, tables = adapted_layers(model), vocabulary_layers(model)
    for name, tensor in originals:
        table, _, leaf = name.rpartition(".")
        if table in tables:
            tensor = _with_rows(tables[table], leaf, tensor)
        layer = layers.get(name.removesuffix(".weight"))
        if layer is not None and name.endswith(".weight"):
            tensor = layer.merged(torch.float32, onto=DenseWeight(tensor))
        yield name, _cast(name, tensor, dtype)


def _with_rows(module: nn.Module, leaf: str, tensor: torch.Tensor) -> torch.Tensor:
    """A table of the vocabulary with its trained rows."""
    rows = getattr(module, "token_rows", None)
    return rows.into(tensor) if isinstance(rows, TokenRows) and leaf == "weight" else tensor


def _cast(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    hint = "; export with --dtype bf16" if dtype == torch.float16 else ""
    return cast_checked(name, tensor, dtype, hint)


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers of a module itself."""
    yield from module.named_parameters(recurse=False)
    for leaf, buffer in module.named_buffers(recurse=False):
        if leaf not in module._non_persistent_buffers_set:
            yield leaf, buffer
