"""Writes a model as one GGUF file for llama.cpp, a tensor at a time."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
import transformers
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, LlamaFileType
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qdora.errors import InputError, suggest
from qdora.models.formats.gguf import BLOCK_NAMES, EMBEDDING, OUTPUT, QWEN2_BIASES, ROPE_FACTORS, TOP_NAMES
from qdora.models.formats.gguf_tokenizer import add_tokenizer
from qdora.models.formats.write import cast_checked

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

TYPES = {
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}
"""Encoding of the matrices; vectors are float32, and under q4_0 the matrix of the output layer is q8_0."""

_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2"}
"""llama.cpp's names, by those of transformers."""


@dataclass(frozen=True)
class _Place:
    """Where a tensor goes, and how: its first byte is counted from the start of the data."""

    shape: tuple[int, ...]
    encoding: GGMLQuantizationType
    start: int


@dataclass(frozen=True)
class GGUFPlan:
    """All of a file but its tensors' values.

    Attributes:
        config: of the model.
        writer: holds the metadata and the table of tensors.
        places: by the tensors' names in transformers.
        factors: by which rotary frequencies are divided, where they are scaled.
        size: of the data, in bytes.
    """

    config: PreTrainedConfig
    writer: GGUFWriter
    places: dict[str, _Place]
    factors: torch.Tensor | None
    size: int

    def write(self, path: Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Write the file; not atomic by itself, and once.

        Args:
            tensors: the model's, on the CPU, in any order; one at a time is read and kept.
        Raises: InputError: a value does not fit the encoding, or a tensor is missing, left over or of another
            shape than the configuration says.
        """
        self.writer.write_header_to_file(path)
        self.writer.write_kv_data_to_file()
        self.writer.write_ti_data_to_file()
        self.writer.close()
        data = GGUFWriter.ggml_pad(path.stat().st_size, self.writer.data_alignment)
        missing = self.places.keys() - {ROPE_FACTORS}
        with path.open("r+b") as file:
            file.truncate(data + self.size)
            if self.factors is not None:
                file.seek(data + self.places[ROPE_FACTORS].start)
                self.factors.numpy().tofile(file)
            for name, tensor in tensors:
                if name.endswith(_DERIVED) or (name == "lm_head.weight" and self.config.tie_word_embeddings):
                    continue
                place = self.places.get(name)
                if place is None or name not in missing or tuple(tensor.shape) != place.shape:
                    raise InputError(
                        f"{name} {tuple(tensor.shape)} has no place in a {self.config.model_type} model of "
                        "this configuration"
                    )
                missing = missing - {name}
                file.seek(data + place.start)
                self._encoded(name, tensor, place.encoding).tofile(file)
                del tensor  # before the next one is made
        if missing:
            raise InputError(f"{len(missing)} tensors are missing: {', '.join(sorted(missing)[:3])}")

    def _encoded(
        self, name: str, tensor: torch.Tensor, encoding: GGMLQuantizationType
    ) -> npt.NDArray[np.generic]:
        if self.config.model_type != "qwen2":
            tensor = _neighbouring_rows(name, tensor, self.config)
        if encoding == GGMLQuantizationType.F16:
            hint = "; export with --type q8_0"
            return cast_checked(name, tensor, torch.float16, hint).numpy()
        tensor = cast_checked(name, tensor, torch.float32)
        if encoding != GGMLQuantizationType.F32:
            # The scale of a block is a float16: an eighth of its largest value, or less.
            hint = f", as the scale of a block of {encoding.name}"
            cast_checked(name, torch.stack(tensor.aminmax()) / 8, torch.float16, hint)
        return gguf.quantize(tensor.numpy(), encoding)


_DERIVED = "rotary_emb.inv_freq"
"""A buffer that old checkpoints have; computed from the configuration."""


def plan_gguf(
    config: PreTrainedConfig,
    kind: str,
    tokenizer: PreTrainedTokenizerBase,
    generation_config: transformers.GenerationConfig | None = None,
    name: str = "model",
) -> GGUFPlan:
    """Plan a file, from what is known before weights are.

    Args:
        config: of the model; a quantization that it states is of no matter.
        kind: of `TYPES`.
        generation_config: its EOS tokens end an answer beside the tokenizer's.
        name: of the model, for people.
    Raises: InputError: an architecture, setting, shape or tokenizer that cannot be written so.
    """
    matrices, file_type = TYPES[kind]
    _refuse_unsupported(config)
    architecture = _ARCHITECTURES[config.model_type]
    writer = GGUFWriter(None, architecture)
    writer.add_type("model")
    writer.add_name(f"{name}-{kind}")
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    head_dim = _head_dim(config)
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.num_hidden_layers)
    # llama.cpp computes no window in these architectures: up to its size that makes no difference.
    window = getattr(config, "sliding_window", None) or config.max_position_embeddings
    writer.add_context_length(min(config.max_position_embeddings, window))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(head_dim)
    if head_dim * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    ends = generation_config.eos_token_id if generation_config is not None else None
    add_tokenizer(writer, tokenizer, config.vocab_size, ends if isinstance(ends, list) else [])

    factors = _rope_factors(config)
    shapes = _shapes(config) if factors is None else {ROPE_FACTORS: tuple(factors.shape)} | _shapes(config)
    output = EMBEDDING if config.tie_word_embeddings else OUTPUT
    places: dict[str, _Place] = {}
    start = 0
    for hf_name, shape in shapes.items():
        gguf_name, encoding = _gguf_name(hf_name), matrices
        if len(shape) == 1:
            encoding = GGMLQuantizationType.F32
        elif kind == "q4_0" and gguf_name == output:
            encoding = GGMLQuantizationType.Q8_0
        block, block_bytes = GGML_QUANT_SIZES[encoding]
        if shape[-1] % block:
            raise InputError(
                f"--type {kind}: rows of {shape[-1]} values ({hf_name}) are no multiple of its blocks "
                f"of {block}; allowed: --type f16"
            )
        size = math.prod(shape) // block * block_bytes
        writer.add_tensor_info(gguf_name, shape, np.dtype(np.float32), size, raw_dtype=encoding)
        places[hf_name] = _Place(shape, encoding, start)
        start += GGUFWriter.ggml_pad(size, writer.data_alignment)
    return GGUFPlan(config, writer, places, factors, start)


def _refuse_unsupported(config: PreTrainedConfig) -> None:
    kind = config.model_type
    if kind not in _ARCHITECTURES:
        raise InputError(f"--format gguf: no {kind!r} models are written; {suggest(kind, _ARCHITECTURES)}")
    rope = config.rope_parameters
    settings: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "hidden_act": (config.hidden_act, ("silu",)),
        "attention_bias": (kind != "qwen2" and getattr(config, "attention_bias", False), (False,)),
        "mlp_bias": (getattr(config, "mlp_bias", False), (False,)),
        "rope_type": (rope.get("rope_type", "default"), ("default", "llama3")),
        "partial_rotary_factor": (rope.get("partial_rotary_factor", 1.0), (1.0,)),
    }
    for name, (value, allowed) in settings.items():
        if value not in allowed:
            allowed_names = ", ".join(map(repr, allowed))
            raise InputError(f"--format gguf: {kind} with {name} {value!r}; allowed: {allowed_names}")
    if kind == "qwen2" and _head_dim(config) * config.num_attention_heads != config.hidden_size:
        raise InputError(
            f"--format gguf: qwen2 with {config.num_attention_heads} heads of {_head_dim(config)} for "
            f"hidden_size {config.hidden_size}; readers of GGUF expect heads that divide it"
        )


def _head_dim(config: PreTrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """The parameters of the model; a tied output layer has none."""
    config = deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _rope_factors(config: PreTrainedConfig) -> torch.Tensor | None:
    """(head_dim / 2,), by which llama.cpp divides the rotary frequencies; None where they are not scaled."""
    if config.rope_parameters.get("rope_type", "default") == "default":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    powers = torch.arange(0, 2 * scaled.numel(), 2).float() / (2 * scaled.numel())
    factors: torch.Tensor = 1.0 / config.rope_parameters["rope_theta"] ** powers / scaled
    return factors


_GGUF_NAMES = {ours: theirs for theirs, ours in (TOP_NAMES | BLOCK_NAMES | QWEN2_BIASES).items()}


def _gguf_name(name: str) -> str:
    block = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
    return f"blk.{block[1]}.{_GGUF_NAMES[block[2]]}" if block else _GGUF_NAMES.get(name, name)


def _neighbouring_rows(name: str, w_OI: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
    """Reorder the rows of each head of q and k: transformers rotates halves, llama.cpp neighbours."""
    counts = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    heads = counts.get(name.removesuffix(".weight").rpartition(".")[2])
    if heads is None:
        return w_OI
    out, features = w_OI.shape
    return w_OI.view(heads, 2, out // heads // 2, features).transpose(1, 2).reshape(out, features)
