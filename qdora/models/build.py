"""A model's structure without its weights: every frozen layer in place, its parameters on the meta device.

Everything about a checkpoint that can be wrong is found here, from its headers, before a weight is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import accelerate
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qdora.adapters.linear import AdaptedLinear
from qdora.errors import CheckpointError, InputError
from qdora.models.formats import Checkpoint, TensorInfo
from qdora.models.formats.prequantized import StoredNF4, is_part, stored_nf4
from qdora.quant.dense import DenseWeight
from qdora.quant.nf4 import NF4Weight

# Old exports carry the rotary frequencies, which the model derives from its configuration.
_DERIVED = re.compile(r"(^|\.)rotary_emb\.inv_freq$")


@dataclass(frozen=True)
class Quantization:
    """How linear layers become NF4.

    Attributes:
        block_size: weights that share one scale.
        double: quantize the scales as well (QLoRA, arXiv:2305.14314 §3).
    """

    block_size: int = 64
    double: bool = True


@dataclass(frozen=True)
class Skeleton:
    """A model whose weights are still on the meta device, and where they come from.

    Attributes:
        model: its linear layers are `AdaptedLinear`, nothing trainable.
        stored: layers that are stored as NF4, by the name of their weight.
        unused: tensors of the checkpoint that are not read: derived ones, a tied output layer's.
    """

    model: PreTrainedModel
    checkpoint: Checkpoint
    stored: Mapping[str, StoredNF4]
    unused: frozenset[str]


def build_skeleton(
    checkpoint: Checkpoint, compute: torch.dtype, quantization: Quantization | None
) -> Skeleton:
    """The structure of a checkpoint's model.

    Args:
        compute: dtype in which the model computes; stored 16-bit matrices stay 16-bit where it is float32.
        quantization: of the decoder's linear layers; None leaves them as they are stored.
    Raises: InputError: an architecture that is not supported, a layer that NF4 cannot hold.
        CheckpointError: tensors missing, left over or of another shape than the configuration says.
    """
    model = _architecture(checkpoint.config, checkpoint.origin, compute)
    names = frozenset(checkpoint.names())
    tied = _tied_output(model)
    unused = {name for name in names if _DERIVED.search(name) or (tied and name == f"{tied}.weight")}
    facts = {name: checkpoint.info(name) for name in names - unused if not is_part(name)}
    stored = _stored_layers(checkpoint, names, model)
    _check_places(checkpoint, model, facts, stored, skip=tied)
    freeze_structure(
        model, compute, quantization, dtypes={name: fact.dtype for name, fact in facts.items()}, stored=stored
    )
    return Skeleton(model, checkpoint, stored, frozenset(unused))


def architecture_skeleton(
    config: PreTrainedConfig, compute: torch.dtype, quantization: Quantization | None, stored: torch.dtype
) -> PreTrainedModel:
    """The structure of a model of which there is a configuration only, as if its weights were stored so.

    Raises: InputError: as `build_skeleton`.
    """
    model = _architecture(config, config.name_or_path or config.model_type, compute)
    dtypes = {name: stored for name, _ in model.named_parameters()}
    freeze_structure(model, compute, quantization, dtypes=dtypes, stored={})
    return model


def freeze_structure(
    model: PreTrainedModel,
    compute: torch.dtype,
    quantization: Quantization | None,
    *,
    dtypes: Mapping[str, torch.dtype],
    stored: Mapping[str, StoredNF4],
) -> None:
    """Replace every linear layer by a frozen one on the meta device, in place, and freeze the rest.

    Args:
        dtypes: of the stored tensors by parameter name.
        stored: layers that are stored as NF4.
    Raises: InputError: NF4 cannot hold a layer's shape.
    """
    output, tied = output_name(model), _tied_output(model)
    for name, module in list(model.named_modules()):
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            full = f"{name}.{leaf}" if name else leaf
            kept = _kept_dtype(dtypes.get(full, compute), parameter.dim(), compute)
            module.register_parameter(
                leaf,
                nn.Parameter(torch.empty(parameter.shape, dtype=kept, device="meta"), requires_grad=False),
            )
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != tied:
            wanted = None if name == output else quantization
            weight = _frozen_weight(name, module, wanted, stored.get(f"{name}.weight"))
            model.set_submodule(name, AdaptedLinear(weight, module.bias))
    if tied is not None:
        head = model.get_submodule(tied)
        embedding = model.get_input_embeddings().weight
        assert isinstance(head, nn.Linear)
        assert isinstance(embedding, nn.Parameter)
        model.set_submodule(tied, AdaptedLinear(DenseWeight(embedding), head.bias))
    _widen_embeddings(model, compute)
    model.requires_grad_(False)
    model.eval()


def output_name(model: PreTrainedModel) -> str | None:
    """Full name of the output layer."""
    output = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is output), None)


def _architecture(config: PreTrainedConfig, origin: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model with parameters on the meta device and its derived buffers computed."""
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.name_or_path = origin
    try:
        with accelerate.init_empty_weights(include_buffers=False), _quiet():
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{origin}: not a causal language model: {reason}") from None
    if any(isinstance(module, Conv1D) for module in model.modules()):
        raise InputError(
            f"{origin}: a {type(model).__name__} holds its matrices in Conv1D layers, stored as "
            f"(in, out); only models of linear layers are supported"
        )
    return model


def _tied_output(model: PreTrainedModel) -> str | None:
    """Full name of an output layer that shares the embedding's weight."""
    return output_name(model) if model.config.get_text_config().tie_word_embeddings else None


def _stored_layers(
    checkpoint: Checkpoint, names: frozenset[str], model: PreTrainedModel
) -> dict[str, StoredNF4]:
    stored: dict[str, StoredNF4] = {}
    for name, module in model.named_modules():
        weight = f"{name}.weight"
        if isinstance(module, nn.Linear) and weight in names:
            found = stored_nf4(checkpoint, names, weight, (module.out_features, module.in_features))
            if found is not None:
                stored[weight] = found
    return stored


def _check_places(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    facts: Mapping[str, TensorInfo],
    stored: Mapping[str, StoredNF4],
    skip: str | None,
) -> None:
    """Every tensor has a place of its shape, and every parameter a tensor."""
    wanted = dict(model.named_parameters()) | dict(model.named_buffers())
    ignored = [re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    unplaced = [n for n in facts if n not in wanted and not any(p.search(n) for p in ignored)]
    if unplaced:
        raise CheckpointError(
            f"{checkpoint.origin}: {len(unplaced)} tensors have no place in a "
            f"{type(model).__name__}: {', '.join(unplaced[:3])}"
        )
    for name, fact in facts.items():
        if name in wanted and name not in stored and fact.shape != tuple(wanted[name].shape):
            raise CheckpointError(
                f"tensor {name} has shape {tuple(fact.shape)}, the model's configuration says "
                f"{tuple(wanted[name].shape)}"
            )
    missing = [n for n, _ in model.named_parameters() if n not in facts and n != f"{skip}.weight"]
    if missing:
        raise CheckpointError(
            f"{checkpoint.origin}: {len(missing)} tensors are missing: {', '.join(missing[:3])}"
        )


def _kept_dtype(stored: torch.dtype, dim: int, compute: torch.dtype) -> torch.dtype:
    """Matrices stay 16-bit where the compute dtype is wider; vectors cost nothing and are widened."""
    keep = dim > 1 and compute == torch.float32 and stored.is_floating_point
    return stored if keep else compute


def _frozen_weight(
    name: str, linear: nn.Linear, quantization: Quantization | None, stored: StoredNF4 | None
) -> NF4Weight | DenseWeight:
    shape = (linear.out_features, linear.in_features)
    try:
        if stored is not None:
            return NF4Weight.on_meta(
                shape,
                block_size=stored.block_size,
                double_quantization=stored.offset is not None,
                nested_block_size=stored.nested_block_size,
            )
        if quantization is not None:
            return NF4Weight.on_meta(
                shape, block_size=quantization.block_size, double_quantization=quantization.double
            )
    except ValueError as error:
        raise InputError(f"{name}: {error}") from None
    return DenseWeight(linear.weight)


class _Cast:
    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        return output.to(self.dtype)


def _widen_embeddings(model: nn.Module, compute: torch.dtype) -> None:
    """A 16-bit table of a model that computes in float32 hands out float32 rows."""
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.weight.dtype != compute:
            module.register_forward_hook(_Cast(compute))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' advice on settings that do not matter to a skeleton."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
