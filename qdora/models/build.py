"""Build a model on the meta device: every frozen layer in place, no weight read.

Everything about a checkpoint that can be wrong is found here, from its headers, before a weight is read.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from qdora.adapters.inject import EXPERTS, expert_tensors
from qdora.adapters.layer import AdaptedLinear, OutputLinear
from qdora.errors import CheckpointError, InputError
from qdora.models.formats import Checkpoint, TensorInfo
from qdora.models.norm import fuse_norms
from qdora.quant import Quantization
from qdora.quant.stored import StoredWeight, is_statistic, parse_state, state_name, stored_type

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class MetaModel:
    """A model whose weights are still on the meta device, and where they come from.

    Attributes:
        model: its linear layers are `AdaptedLinear`, the output layer apart; nothing trainable.
        stored: layers that are stored quantized, by the name of their weight.
        unused: tensors of the checkpoint that are not read: a tied output layer's.
    """

    model: PreTrainedModel
    checkpoint: Checkpoint
    stored: Mapping[str, StoredWeight]
    unused: frozenset[str]


def build_model(checkpoint: Checkpoint, compute: torch.dtype, quantization: Quantization) -> MetaModel:
    """A checkpoint's model on the meta device.

    Args:
        compute: dtype in which the model computes; stored 16-bit matrices stay 16-bit where it is float32.
        quantization: of the decoder's linear layers that are not stored quantized.
    Raises: InputError: an architecture that is not supported, a layer that the format cannot hold, a
            checkpoint that is quantized in another way.
        CheckpointError: tensors missing, left over or of another shape than the configuration says.
    """
    if _stored_quantization(checkpoint, quantization):
        quantization = Quantization("none")  # for layers that were left as they are
    _check_sizes(checkpoint)
    model = _architecture(checkpoint.config, checkpoint.origin, compute)
    generation_config = checkpoint.generation_config()
    if generation_config is not None:
        model.generation_config = generation_config
    names = frozenset(checkpoint.names())
    tied = _tied_output(model)
    unused = names & {f"{tied}.weight"}
    infos = {name: checkpoint.info(name) for name in names - unused if not is_statistic(name)}
    stored = _stored_layers(checkpoint, names, model)
    _check_places(checkpoint, model, infos, stored, skip=tied)
    dtypes = {name: info.dtype for name, info in infos.items()}
    _freeze_structure(model, compute, quantization, dtypes, stored)
    return MetaModel(model, checkpoint, stored, unused)


def build_architecture(
    config: PreTrainedConfig, compute: torch.dtype, quantization: Quantization, stored: torch.dtype
) -> PreTrainedModel:
    """A model of which there is a configuration only, on the meta device, as if its weights were stored so.

    Raises: InputError: as `build_model`.
    """
    model = _architecture(config, config.name_or_path or config.model_type, compute)
    _freeze_structure(
        model, compute, quantization, {name: stored for name, _ in model.named_parameters()}, {}
    )
    return model


def _freeze_structure(
    model: PreTrainedModel,
    compute: torch.dtype,
    quantization: Quantization,
    dtypes: Mapping[str, torch.dtype],
    stored: Mapping[str, StoredWeight],
) -> None:
    """Replace every linear layer by a frozen one on the meta device, in place, fuse norms, freeze the rest.

    Args:
        dtypes: of the stored tensors by parameter name.
        stored: layers that are stored quantized.
    Raises: InputError: the format cannot hold a layer's shape.
    """
    output, tied = output_name(model), _tied_output(model)
    for name, module in list(model.named_modules()):
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            full = f"{name}.{leaf}" if name else leaf
            stored_dtype = dtypes.get(full, compute)
            # Matrices stay 16-bit where the compute dtype is wider; vectors cost nothing and are widened.
            keep = parameter.dim() > 1 and compute == torch.float32 and stored_dtype.is_floating_point
            empty = torch.empty(parameter.shape, dtype=stored_dtype if keep else compute, device="meta")
            module.register_parameter(leaf, nn.Parameter(empty, requires_grad=False))
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Embedding) and module.weight.dtype != compute:
            # A 16-bit table of a model that computes in float32 hands out float32 rows.
            module.register_forward_hook(lambda module, args, output: output.to(compute))
        if not isinstance(module, nn.Linear):
            continue
        if name != output:
            kept, shape = stored.get(f"{name}.weight"), (module.out_features, module.in_features)
            try:
                base = kept.on_meta() if kept else quantization.on_meta(shape, module.weight.dtype)
            except ValueError as error:
                raise InputError(f"{name}: {error}") from None
            model.set_submodule(name, AdaptedLinear(base, module.bias))
            continue
        head = OutputLinear(module.in_features, module.out_features, module.bias is not None, device="meta")
        head.weight, head.bias = module.weight, module.bias
        if tied is not None:
            embedding = model.get_input_embeddings()
            assert isinstance(embedding, nn.Embedding)
            head.weight = embedding.weight
        model.set_submodule(name, head)
    fuse_norms(model)
    model.requires_grad_(False)
    model.eval()


def output_name(model: PreTrainedModel) -> str | None:
    """Full name of the output layer."""
    output = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is output), None)


def _check_sizes(checkpoint: Checkpoint) -> None:
    """Refuse sizes that the stored tensors cannot have, before time and memory go into such a model.

    Raises: CheckpointError: naming the size; also for a probability of dropout that is none.
    """
    shapes = [checkpoint.info(name).shape for name in checkpoint.names()]
    longest = max((size for shape in shapes for size in shape), default=0)
    most = {
        "num_hidden_layers": len(shapes),
        "hidden_size": longest,
        "vocab_size": longest,
        "head_dim": max(map(math.prod, shapes), default=0),
    }
    config = checkpoint.config.get_text_config()
    for key, bound in most.items():
        size = getattr(config, key, None)
        if isinstance(size, int) and not 0 < size <= bound:
            raise CheckpointError(
                f"{checkpoint.origin}: its configuration says {key} {size}; its {len(shapes)} tensors allow "
                f"1 to {bound}"
            )
    for key, value in vars(config).items():
        if key.endswith(("dropout", "pdrop")) and isinstance(value, int | float) and not 0 <= value < 1:
            raise CheckpointError(
                f"{checkpoint.origin}: its configuration says {key} {value}; allowed: from 0 to below 1"
            )


def _architecture(config: PreTrainedConfig, origin: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model with parameters on the meta device and its derived buffers computed."""
    from accelerate import init_empty_weights  # a quarter of a second

    config = copy.deepcopy(config)  # the checkpoint's own still says how its weights are stored
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.name_or_path = origin
    try:
        with init_empty_weights(include_buffers=False), _quiet():
            model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{origin}: not a causal language model: {reason}") from None
    except Exception as error:  # each architecture has errors of its own for impossible sizes
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{origin}: no model can be built of its configuration: {type(error).__name__}: {reason}"
        ) from error
    if any(isinstance(module, Conv1D) for module in model.modules()):
        raise InputError(
            f"{origin}: a {type(model).__name__} holds its matrices in Conv1D layers, stored as "
            f"(in, out); only models of linear layers are supported"
        )
    experts = expert_tensors(model)
    if experts:
        raise InputError(f"{origin}: {type(model).__name__}: {EXPERTS} ({experts[0]})")
    return model


def _tied_output(model: PreTrainedModel) -> str | None:
    """Full name of an output layer that shares the embedding's weight."""
    return output_name(model) if model.config.get_text_config().tie_word_embeddings else None


def _stored_quantization(checkpoint: Checkpoint, quantization: Quantization) -> bool:
    """Whether the checkpoint is quantized already, in the format that was asked for."""
    stated = checkpoint.quantization
    if stated is None:
        return False
    kind = stored_type(stated)
    if kind != quantization.name:
        raise InputError(
            f"{checkpoint.origin}: already quantized to {kind}; model.quantization must be {kind!r}, "
            f"got {quantization.name!r}"
        )
    return True


def _stored_layers(
    checkpoint: Checkpoint, names: frozenset[str], model: PreTrainedModel
) -> dict[str, StoredWeight]:
    """The linear layers that are stored quantized, by the name of their weight.

    Raises: CheckpointError: a statistic is missing or cannot be used.
    """
    stored: dict[str, StoredWeight] = {}
    for module_name, module in model.named_modules():
        weight = f"{module_name}.weight"
        if not isinstance(module, nn.Linear) or weight not in names:
            continue
        state = state_name(weight, names)
        if state is None and checkpoint.info(weight).dtype != torch.uint8:
            continue
        try:
            if state is None:
                raise ValueError("the tensor with its quantization state is missing")
            stated = checkpoint.quantization
            allowed = ["nf4"] if stated is None else [stored_type(stated)]
            shape = (module.out_features, module.in_features)
            stored[weight] = parse_state(weight, checkpoint.read(state), shape, allowed)
            for name, (count, dtype) in stored[weight].expected().items():
                if name not in names:
                    raise ValueError(f"tensor {name} is missing")
                found = checkpoint.info(name)
                if math.prod(found.shape) != count or found.dtype.itemsize != dtype.itemsize:
                    got = f"{found.dtype} of shape {tuple(found.shape)}"
                    raise ValueError(f"tensor {name} is {got}, expected {count} x {dtype}")
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise CheckpointError(f"{weight}: unusable quantization statistics: {error}") from None
    return stored


def _check_places(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    infos: Mapping[str, TensorInfo],
    stored: Mapping[str, StoredWeight],
    skip: str | None,
) -> None:
    """Every tensor has a parameter or buffer of its shape, and every parameter a tensor."""
    wanted = dict(model.named_parameters()) | dict(model.named_buffers())
    ignored = [re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    unplaced = [n for n in infos if n not in wanted and not any(p.search(n) for p in ignored)]
    if unplaced:
        raise CheckpointError(
            f"{checkpoint.origin}: {len(unplaced)} tensors have no place in a "
            f"{type(model).__name__}: {', '.join(unplaced[:3])}"
        )
    for name, info in infos.items():
        if name in wanted and name not in stored and info.shape != tuple(wanted[name].shape):
            raise CheckpointError(
                f"tensor {name} has shape {tuple(info.shape)}, the model's configuration says "
                f"{tuple(wanted[name].shape)}"
            )
    missing = [n for n, _ in model.named_parameters() if n not in infos and n != f"{skip}.weight"]
    if missing:
        raise CheckpointError(
            f"{checkpoint.origin}: {len(missing)} tensors are missing: {', '.join(missing[:3])}"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' advice on settings that do not matter before there are weights."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
