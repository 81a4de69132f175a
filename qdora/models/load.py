"""Load a base model: its tensors stream from disk straight into their frozen layers.

A linear layer of the decoder becomes NF4 the moment its weight arrives, so the peak is the
4-bit model plus about one tensor.  Embeddings, norms and the output layer are not quantized.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qdora.config import BaseKind, DtypeName
from qdora.models.dtype import compute_dtype, resolve_device
from qdora.models.fill import fill
from qdora.models.prequantized import check_quantization
from qdora.models.resolve import open_checkpoint
from qdora.models.skeleton import Quantization, Skeleton, build_skeleton


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
    target = resolve_device(device)
    skeleton = open_skeleton(
        path_or_id,
        base=base,
        dtype=dtype,
        device=target,
        revision=revision,
        block_size=block_size,
        double_quantization=double_quantization,
    )
    return fill(skeleton, target, progress=progress), skeleton.checkpoint.tokenizer()


def open_skeleton(
    path_or_id: str,
    *,
    base: BaseKind = "nf4",
    dtype: DtypeName = "auto",
    device: torch.device,
    revision: str | None = None,
    block_size: int = 64,
    double_quantization: bool = True,
) -> Skeleton:
    """Find a model and build its structure; no weight is read, and no memory taken for one.

    Args: as `load_base`.
    Raises: as `load_base`.
    """
    checkpoint = open_checkpoint(path_or_id, revision)
    quantized = check_quantization(checkpoint, base)
    wanted = None if base == "dense" or quantized else Quantization(block_size, double_quantization)
    return build_skeleton(checkpoint, compute_dtype(dtype, device), wanted)
