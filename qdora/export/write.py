"""Merge the adapter into 16-bit weights, write a folder that transformers and vLLM load, and verify it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn

from qdora.adapters.inject import adapted_layers, refuse_overflow
from qdora.adapters.layer import AdaptedLinear
from qdora.adapters.tokens import TokenRows
from qdora.adapters.vocabulary import vocabulary_layers
from qdora.errors import InputError
from qdora.files import atomic_directory
from qdora.models.formats.write import cast_checked, write_model_folder
from qdora.output import check_output
from qdora.quant.dense import DenseWeight

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
    check_output(directory, overwrite)
    refuse_overflow(model, "the model")
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
        if name.startswith(inside) or isinstance(module, TokenRows):
            continue
        if isinstance(module, AdaptedLinear):
            inside = (f"{name}.",)
            if any(id(parameter) in seen for parameter in module.base.parameters()):
                continue  # an output layer that is tied to the embedding
            yield f"{name}.weight", _cast(f"{name}.weight", module.merged(torch.float32), dtype)
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


BOUNDS = {torch.float16: 1e-2, torch.bfloat16: 8e-2}
"""Largest relative error of logits: the weights' rounding (2⁻¹¹, 2⁻⁸), grown over the layers."""


class VerificationError(InputError):
    """The export does not load cleanly, or its logits differ from the adapted model's."""


@dataclass(frozen=True)
class Verification:
    """How near the exported model's logits are to the adapted model's.

    Attributes:
        relative_error: ||exported − adapted|| / ||adapted|| over all logits.
        bound: largest relative error that is accepted.
        same_next_token: fraction of positions with the same most likely next token.
        positions: how many were compared.
    """

    relative_error: float
    bound: float
    same_next_token: float
    positions: int


@torch.no_grad()
def verify_export(directory: str | Path, model: PreTrainedModel, input_ids_BT: torch.Tensor) -> Verification:
    """Load the folder with transformers and compare its logits with the adapted model's.

    Args:
        directory: the exported folder.
        model: the adapted model, in evaluation mode.
        input_ids_BT: (B, T) tokens to compare on.
    Raises: VerificationError: it does not load, tensors are missing or left over, or the logits are out of
        bound.
    """
    device = next(model.parameters()).device
    adapted_BTV = model(input_ids=input_ids_BT.to(device)).logits.float().cpu()
    compute = torch.float32 if device.type == "cpu" else "auto"
    try:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=compute, output_loading_info=True
        )
        bound = _bound(directory, model)
    except Exception as cause:
        raise VerificationError(f"{directory}: transformers cannot load it: {cause}") from cause
    exported, info = loaded
    faults = {kind: sorted(info[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(faults.values()):
        raise VerificationError(f"{directory}: transformers reports {faults}")
    exported_BTV = exported.to(device)(input_ids=input_ids_BT.to(device)).logits.float().cpu()
    error = float((exported_BTV - adapted_BTV).norm() / adapted_BTV.norm())
    same = (exported_BTV.argmax(-1) == adapted_BTV.argmax(-1)).float().mean()
    result = Verification(error, bound, float(same), input_ids_BT.numel())
    if not error <= result.bound:
        raise VerificationError(
            f"{directory}: relative error of the logits {error:.2e} exceeds the bound {result.bound:.0e}"
        )
    return result


def _bound(directory: str | Path, model: PreTrainedModel) -> float:
    """The looser of the bounds for the exported weights' dtype and the adapted model's activations."""
    # From config.json: the loaded weights may have been widened.
    stored: torch.dtype = transformers.AutoConfig.from_pretrained(directory).dtype
    embedding = model.get_input_embeddings()
    activation = embedding(torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device))
    return max(BOUNDS[stored], BOUNDS.get(activation.dtype, 0.0))
