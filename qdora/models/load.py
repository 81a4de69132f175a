"""Load a base model: its tensors stream from disk straight into their frozen layers.

A linear layer of the decoder becomes NF4 the moment its weight arrives, so the peak is the
4-bit model plus about one tensor.  Embeddings, norms and the output layer are not quantized.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import accelerate
import torch
import transformers
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from qdora.adapters.fingerprint import combine, set_base_fingerprint, tensor_digest
from qdora.adapters.linear import AdaptedLinear
from qdora.config import BaseKind, DtypeName
from qdora.errors import CheckpointError, InputError
from qdora.models.checkpoint import Checkpoint
from qdora.models.dtype import compute_dtype, resolve_device
from qdora.models.heap import WORTH_TRIMMING, release_freed_memory
from qdora.models.prequantized import PrequantizedParts, check_quantization
from qdora.models.resolve import open_checkpoint
from qdora.quant.dense import DenseWeight
from qdora.quant.nf4 import NF4Weight
from qdora.quant.weight import FrozenWeight

# Old exports carry the rotary frequencies, which the model derives from its configuration.
_DERIVED = re.compile(r"(^|\.)rotary_emb\.inv_freq$")


def load_base(
    path_or_id: str,
    *,
    base: BaseKind = "nf4",
    dtype: DtypeName = "auto",
    device: str | torch.device = "auto",
    revision: str | None = None,
    block_size: int = 64,
    double_quantization: bool = True,
    progress: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load a frozen causal language model, its linear layers ready for adapters.

    Args:
        path_or_id: hub id, safetensors folder (plain, or quantized to NF4 by bitsandbytes), GGUF
            file, or packaged model.
        base: `nf4` quantizes the decoder's linear layers; `dense` keeps the stored 16 bits.
        dtype: compute dtype; 16-bit tensors stay 16-bit in memory where it is float32.
        device: where the model goes; `auto` prefers CUDA.
        revision: of a hub id.
        block_size: weights that share one NF4 scale.
        double_quantization: quantize the scales as well (QLoRA, arXiv:2305.14314 §3).
        progress: show a bar on standard error.
    Returns: the model in evaluation mode, nothing trainable; its tokenizer, None where it has none.
    Raises: InputError: no such model, an unsupported architecture or quantization.
        CheckpointError: a file is missing, truncated or corrupt, or does not fit its configuration.
    """
    checkpoint = open_checkpoint(path_or_id, revision)
    quantized = check_quantization(checkpoint, base)
    target = resolve_device(device)
    loader = _Loader(
        _skeleton(checkpoint, compute_dtype(dtype, target)),
        device=target,
        compute=compute_dtype(dtype, target),
        quantize=base == "nf4" and not quantized,
        block_size=block_size,
        double_quantization=double_quantization,
    )
    total = len(checkpoint.names())
    with tqdm(
        total=total, desc="Loading", unit="tensor", leave=False, mininterval=1, disable=not progress
    ) as bar:
        for name, tensor in checkpoint.tensors():
            loader.place(name, tensor)
            if tensor.nbytes >= WORTH_TRIMMING:
                del tensor
                release_freed_memory()
            bar.update()
    model = loader.finish(checkpoint)
    return model, checkpoint.tokenizer()


def _skeleton(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    """The architecture with parameters on the meta device and its derived buffers computed."""
    config = checkpoint.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.name_or_path = checkpoint.origin
    try:
        with accelerate.init_empty_weights(include_buffers=False), _quiet():
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{checkpoint.origin}: not a causal language model: {reason}") from None
    if any(isinstance(module, Conv1D) for module in model.modules()):
        raise InputError(
            f"{checkpoint.origin}: a {type(model).__name__} holds its matrices in Conv1D layers, stored as "
            f"(in, out); only models of linear layers are supported"
        )
    return model


class _Loader:
    """Places one tensor after the other into the skeleton."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        device: torch.device,
        compute: torch.dtype,
        quantize: bool,
        block_size: int,
        double_quantization: bool,
    ) -> None:
        self.model, self.device, self.compute = model, device, compute
        self.quantize = quantize
        self.block_size, self.double_quantization = block_size, double_quantization
        self.parts = PrequantizedParts()
        self.digests: dict[str, str] = {}
        output = model.get_output_embeddings()
        self.output_name = next((n for n, m in model.named_modules() if m is output), None)
        self.tied = bool(model.config.get_text_config().tie_word_embeddings)
        self.unplaced: list[str] = []

    def place(self, name: str, tensor: torch.Tensor) -> None:
        """Put a tensor where its name says."""
        self.digests[name] = tensor_digest(name, tensor)
        if self.parts.is_part(name, tensor):
            complete = self.parts.add(name, tensor.to(self.device))
            if complete is not None:
                layer_name, weight_of = complete
                linear = self.model.get_submodule(layer_name)
                assert isinstance(linear, nn.Linear)
                self._set_linear(layer_name, weight_of((linear.out_features, linear.in_features)))
            return
        if _DERIVED.search(name) or (self.tied and name == f"{self.output_name}.weight"):
            return
        module_name, _, leaf = name.rpartition(".")
        try:
            module = self.model.get_submodule(module_name)
            expected = module.get_parameter(leaf) if leaf in module._parameters else module.get_buffer(leaf)
        except AttributeError:
            self.unplaced.append(name)
            return
        if expected.shape != tensor.shape:
            raise CheckpointError(
                f"tensor {name} has shape {tuple(tensor.shape)}, the model's configuration says "
                f"{tuple(expected.shape)}"
            )
        if isinstance(module, nn.Linear) and leaf == "weight":
            self._set_linear(module_name, self._frozen_weight(module_name, tensor))
        elif leaf in module._buffers:
            module._buffers[leaf] = tensor.to(self.device)
        else:
            module._parameters[leaf] = self._parameter(tensor)

    def finish(self, checkpoint: Checkpoint) -> PreTrainedModel:
        """Tie, check that nothing is missing or left over, and hand the model out."""
        model = self.model
        ignored = [re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
        unplaced = [name for name in self.unplaced if not any(p.search(name) for p in ignored)]
        if unplaced:
            raise CheckpointError(
                f"{checkpoint.origin}: {len(unplaced)} tensors have no place in a "
                f"{type(model).__name__}: {', '.join(unplaced[:3])}"
            )
        if self.tied and self.output_name is not None:
            embedding = model.get_input_embeddings()
            assert isinstance(embedding.weight, nn.Parameter)
            self._set_linear(self.output_name, DenseWeight(embedding.weight))
        missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
        missing += [f"{name}.weight" for name in self.parts.incomplete()]
        if missing:
            raise CheckpointError(
                f"{checkpoint.origin}: {len(missing)} tensors are missing: {', '.join(missing[:3])}"
            )
        for module in model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(self.device)
        self._widen_embeddings()
        generation_config = checkpoint.generation_config()
        if generation_config is not None:
            model.generation_config = generation_config
        set_base_fingerprint(model, combine(self.digests))
        model.requires_grad_(False)
        model.eval()
        return model

    def _frozen_weight(self, name: str, tensor: torch.Tensor) -> FrozenWeight:
        if self.quantize and name != self.output_name:
            try:
                return NF4Weight.quantize(
                    tensor.to(self.device),
                    block_size=self.block_size,
                    double_quantization=self.double_quantization,
                )
            except ValueError as error:
                raise InputError(f"{name}: {error}") from None
        return DenseWeight(self._parameter(tensor))

    def _parameter(self, tensor: torch.Tensor) -> nn.Parameter:
        """Matrices stay 16-bit where the compute dtype is wider; vectors cost nothing and are widened."""
        keep = tensor.dim() > 1 and self.compute == torch.float32 and tensor.is_floating_point()
        return nn.Parameter(
            tensor.to(self.device, tensor.dtype if keep else self.compute), requires_grad=False
        )

    def _set_linear(self, name: str, weight: FrozenWeight) -> None:
        linear = self.model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        self.model.set_submodule(name, AdaptedLinear(weight, linear.bias))

    def _widen_embeddings(self) -> None:
        """A 16-bit table of a model that computes in float32 hands out float32 rows."""
        for module in self.model.modules():
            if isinstance(module, nn.Embedding) and module.weight.dtype != self.compute:
                module.register_forward_hook(_Cast(self.compute))


class _Cast:
    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output.to(self.dtype)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' advice on settings that do not matter to a skeleton."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
