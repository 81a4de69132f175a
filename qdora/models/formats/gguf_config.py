"""The `transformers` configuration that the metadata of a GGUF file describes.

Read from the header that is already parsed: `AutoConfig` would parse the full vocabulary again,
and silently drops the rope scaling of LLaMA 3.1 and later.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qdora.errors import CheckpointError, InputError, suggest

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}

_SHAPE_KEYS = {
    "num_hidden_layers": "block_count",
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
_TOKEN_KEYS = {
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "padding_token_id",
    "unk_token_id": "unknown_token_id",
}
_LLAMA3_ORIGINAL_CONTEXT = 8192


def gguf_config(
    path: Path, metadata: dict[str, Any], vocab_size: int, tied: bool, rope_factors: torch.Tensor | None
) -> PreTrainedConfig:
    """Configuration of the model in a GGUF file.

    Args:
        path: named in errors.
        metadata: of its header.
        vocab_size: rows of the embedding.
        tied: there is no output matrix, the embedding serves as one.
        rope_factors: (head_dim / 2,), by which the rotary frequencies are divided, where stored.
    Raises:
        InputError: an architecture, a mixture of experts or a rope scaling that is not supported.
        CheckpointError: a key is missing, or its value is impossible.
    """
    architecture = str(metadata.get("general.architecture"))
    if architecture not in _ARCHITECTURES:
        raise InputError(
            f"{path}: architecture {architecture!r} cannot be read from GGUF; "
            f"{suggest(architecture, _ARCHITECTURES)} (or give the model's safetensors folder)"
        )
    prefix = f"{architecture}."
    own = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    # Stored as float32: the shortest decimal that rounds to it is the number that was meant.
    own |= {key: float(str(np.float32(value))) for key, value in own.items() if isinstance(value, float)}
    _refuse_unsupported(path, metadata.get("split.count", 1), own)
    for key in _SHAPE_KEYS.values():
        if own.get(key) is None:
            raise CheckpointError(f"{path}: corrupt: its metadata lack {architecture}.{key}")
    fields = {field: own[key] for field, key in _SHAPE_KEYS.items()}
    fields |= {field: metadata.get(f"tokenizer.ggml.{key}") for field, key in _TOKEN_KEYS.items()}
    try:
        if architecture == "llama":
            head_dim = fields["hidden_size"] // fields["num_attention_heads"]
            fields["head_dim"] = own.get("attention.key_length", own.get("rope.dimension_count", head_dim))
        config: PreTrainedConfig = AutoConfig.for_model(
            architecture,
            **fields,
            num_key_value_heads=own.get("attention.head_count_kv", fields["num_attention_heads"]),
            vocab_size=vocab_size,
            tie_word_embeddings=tied,
            rope_parameters={"rope_type": "default", "rope_theta": own.get("rope.freq_base", 10000.0)},
            architectures=[_ARCHITECTURES[architecture]],
        )
    except Exception as error:  # configuration classes have errors of their own for impossible values
        raise CheckpointError(f"{path}: its metadata cannot be used: {error}") from error
    if rope_factors is not None:
        config.rope_parameters = _llama3_scaling(path, config, rope_factors)
    return config


def _refuse_unsupported(path: Path, parts: int, own: dict[str, Any]) -> None:
    if parts > 1:
        raise InputError(f"{path}: one of {parts} parts; merge the parts into one GGUF file")
    if own.get("expert_count", 0):
        raise InputError(f"{path}: a mixture of {own['expert_count']} experts is not supported")
    scaling = own.get("rope.scaling.type", "none")
    if scaling != "none":
        raise InputError(
            f"{path}: rope scaling {scaling!r} in a GGUF file is not supported; "
            "give the model's safetensors folder"
        )


def _llama3_scaling(path: Path, config: PreTrainedConfig, factors: torch.Tensor) -> dict[str, Any]:
    """The rope scaling that yields these frequency factors, the only trace of it in a GGUF file.

    Its parameters are those of every LLaMA 3.1-3.3 model, except the factor, which is the largest one.

    Raises: InputError: they do not yield the factors.
    """
    plain = config.rope_parameters["rope_theta"] ** -torch.linspace(0, 1, factors.numel() + 1)[:-1]
    parameters = {
        "rope_type": "llama3",
        "rope_theta": config.rope_parameters["rope_theta"],
        "factor": factors.max().item(),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": _LLAMA3_ORIGINAL_CONTEXT,
    }
    candidate = type(config)(**(config.to_dict() | {"rope_parameters": parameters}))
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](candidate, torch.device("cpu"))
    if scaled.shape != plain.shape or not torch.allclose(scaled * factors, plain, rtol=1e-3):
        raise InputError(
            f"{path}: its rope scaling is not the one of LLaMA 3; give the model's safetensors folder"
        )
    return parameters
