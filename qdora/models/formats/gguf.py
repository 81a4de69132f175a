"""A base model in one GGUF file: its configuration from the header, its weights dequantized one by one."""

from __future__ import annotations

import math
import re
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
import transformers
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
from transformers import GenerationConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qdora.errors import CheckpointError, InputError, suggest
from qdora.models.formats import Checkpoint, TensorInfo, read_bytes
from qdora.models.formats.gguf_tokenizer import split_as_llama_cpp

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

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


def gguf_config(
    path: Path, metadata: dict[str, Any], vocab_size: int, tied: bool, rope_factors: torch.Tensor | None
) -> PreTrainedConfig:
    """Configuration of the model, from the file's header: `AutoConfig` drops LLaMA 3.1's rope scaling.

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
    experts = metadata.get(f"{architecture}.expert_count", 0)
    if experts:
        raise InputError(f"{path}: {architecture}: a mixture of {experts} experts is not supported")
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
        config: PreTrainedConfig = transformers.AutoConfig.for_model(
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
        "original_max_position_embeddings": 8192,
    }
    candidate = type(config)(**(config.to_dict() | {"rope_parameters": parameters}))
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](candidate, torch.device("cpu"))
    if scaled.shape != plain.shape or not torch.allclose(scaled * factors, plain, rtol=1e-3):
        raise InputError(f"{path}: its rope scaling is not LLaMA 3's; give the model's safetensors folder")
    return parameters


# llama.cpp's tensor names and those of transformers; in a block without "blk.N." and "model.layers.N.".
EMBEDDING, OUTPUT, ROPE_FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"
TOP_NAMES = {
    EMBEDDING: "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    OUTPUT: "lm_head.weight",
}
BLOCK_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
QWEN2_BIASES = {f"attn_{part}.bias": f"self_attn.{part}_proj.bias" for part in "qkv"}

_PLAIN = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}

# Of the header: struct codes by value type, and the types that are not scalars.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor in a GGUF file.

    Attributes:
        name: llama.cpp's, for example `blk.0.attn_q.weight`.
        shape: in torch's order, (out, in) for a linear layer.
        encoding: of its values.
        start: first byte, from the start of the file.
        size: in bytes.
    """

    name: str
    shape: tuple[int, ...]
    encoding: GGMLQuantizationType
    start: int
    size: int


@dataclass(frozen=True)
class GGUFFile(Checkpoint):
    """A GGUF file of the llama (LLaMA, Mistral, SmolLM) or qwen2 architecture.

    Attributes:
        metadata: of its header, by llama.cpp's keys.
        stored: the tensors by their name in `transformers`, in file order.
    """

    metadata: dict[str, Any]
    stored: dict[str, GGUFTensor]

    @classmethod
    def open(cls, path: Path, origin: str) -> GGUFFile:
        """Open and check a GGUF file.

        Raises: CheckpointError: not GGUF, truncated or corrupt.
            InputError: an architecture, encoding or tensor that is not supported.
        """
        try:
            with path.open("rb") as file:
                metadata, tensors = _HeaderReader(path, file, path.stat().st_size).header()
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from None
        by_name = {tensor.name: tensor for tensor in tensors}
        factors = _read_tensor(path, by_name.pop(ROPE_FACTORS)) if ROPE_FACTORS in by_name else None
        if EMBEDDING not in by_name:
            raise CheckpointError(f"{path}: corrupt: it has no tensor {EMBEDDING}")
        vocab_size = by_name[EMBEDDING].shape[0]
        config = gguf_config(path, metadata, vocab_size, OUTPUT not in by_name, factors)
        _check_encodings(path, tensors)
        stored = {_hf_name(path, name, config.model_type): tensor for name, tensor in by_name.items()}
        in_order = dict(sorted(stored.items(), key=lambda item: item[1].start))
        return cls(origin, path, config, metadata, in_order)

    def names(self) -> list[str]:
        """As `Checkpoint.names`."""
        return list(self.stored)

    def info(self, name: str) -> TensorInfo:
        """As `Checkpoint.info`."""
        tensor = self.stored[name]
        return TensorInfo(tensor.shape, _PLAIN.get(tensor.encoding, torch.float32))

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """As `Checkpoint.read`: plain encodings keep their dtype, quantized ones become float32.

        The full tensor is read even where some rows are wanted: their order changes.
        """
        tensor = self._in_head_order(name, _read_tensor(self.path, self.stored[name]))
        return tensor if rows is None or not tensor.dim() else tensor[rows].clone()

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """As `Checkpoint.tokenizer`."""
        if "tokenizer.ggml.tokens" not in self.metadata:
            return None
        try:
            # In a folder by itself: a tokenizer.json beside the file would be taken instead.
            with tempfile.TemporaryDirectory() as alone:
                Path(alone, self.path.name).symlink_to(self.path.resolve())
                # Not AutoTokenizer: it would read the file's configuration with the slow reader first.
                tokenizer: PreTrainedTokenizerBase = transformers.PreTrainedTokenizerFast.from_pretrained(
                    alone, gguf_file=self.path.name
                )
        except Exception as error:
            raise InputError(f"{self.path}: its tokenizer cannot be used: {error}") from error
        tokenizer.name_or_path = str(self.path)
        split_as_llama_cpp(tokenizer, self.metadata.get("tokenizer.ggml.pre"))
        return tokenizer

    def generation_config(self) -> GenerationConfig | None:
        """As `Checkpoint.generation_config`: its special tokens."""
        tokens = {key: getattr(self.config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        generation: GenerationConfig = GenerationConfig.from_dict(tokens)
        return generation

    def _in_head_order(self, name: str, w_OI: torch.Tensor) -> torch.Tensor:
        """Reorder the rows of each head: llama.cpp rotates neighbouring rows, `transformers` halves."""
        layer, _, leaf = name.rpartition(".")
        counts = {"q_proj": self.config.num_attention_heads, "k_proj": self.config.num_key_value_heads}
        heads = counts.get(layer.rpartition(".")[2])
        if heads is None or leaf != "weight" or self.config.model_type != "llama":
            return w_OI
        out, features = w_OI.shape
        if out % (2 * heads):
            raise CheckpointError(
                f"{self.path}: {name} {tuple(w_OI.shape)} does not divide into {heads} heads"
            )
        return w_OI.view(heads, out // heads // 2, 2, features).transpose(1, 2).reshape(out, features)


def _hf_name(path: Path, name: str, model_type: str) -> str:
    """The name in `transformers` of llama.cpp's tensor."""
    if name in TOP_NAMES:
        return TOP_NAMES[name]
    names = BLOCK_NAMES | (QWEN2_BIASES if model_type == "qwen2" else {})
    block = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
    if block is None or block[2] not in names:
        raise InputError(f"{path}: tensor {name!r} has no place in a {model_type} model")
    return f"model.layers.{block[1]}.{names[block[2]]}"


def _read_tensor(path: Path, tensor: GGUFTensor) -> torch.Tensor:
    raw = read_bytes(path, tensor.start, tensor.size)
    if tensor.encoding in _PLAIN:
        return torch.from_numpy(raw).view(_PLAIN[tensor.encoding]).view(tensor.shape)
    values = dequantize(raw.reshape(*tensor.shape[:-1], -1), tensor.encoding)
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))


def _check_encodings(path: Path, tensors: tuple[GGUFTensor, ...]) -> None:
    """Dequantize one row of each encoding: refused before an hour of loading, not after."""
    examples = {t.encoding: t for t in reversed(tensors) if t.encoding not in _PLAIN and t.size}
    for encoding, tensor in examples.items():
        row_bytes = tensor.size // math.prod(tensor.shape[:-1])
        try:
            dequantize(read_bytes(path, tensor.start, row_bytes).reshape(1, -1), encoding)
        except NotImplementedError:
            raise InputError(
                f"{path}: tensor {tensor.name}: encoding {encoding.name} cannot be read"
            ) from None


class _HeaderReader:
    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.file, self.size = path, file, size

    def header(self) -> tuple[dict[str, Any], tuple[GGUFTensor, ...]]:
        """Metadata, and tensors in file order."""
        if self.size < 4 or self.take(4) != b"GGUF":
            raise CheckpointError(f"{self.path}: not a GGUF file (it does not begin with 'GGUF')")
        version = self.scalar("I")
        if version not in _VERSIONS:
            order = "big-endian " if version & 0xFFFF == 0 else ""
            raise InputError(f"{self.path}: {order}GGUF version {version}; readable: little-endian 2 and 3")
        tensor_count, pair_count = self.scalar("Q"), self.scalar("Q")
        metadata = {self.string(): self.value(self.scalar("I")) for _ in range(pair_count)}
        rows = [self.tensor_row() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise CheckpointError(f"{self.path}: corrupt: general.alignment is {alignment!r}")
        data_start = math.ceil(self.file.tell() / alignment) * alignment
        tensors = tuple(self.tensor(*row, data_start) for row in rows)
        if len({tensor.name for tensor in tensors}) != len(tensors):
            raise CheckpointError(f"{self.path}: corrupt: a tensor name occurs twice")
        end = max((tensor.start + tensor.size for tensor in tensors), default=0)
        if end > self.size:
            raise CheckpointError(
                f"{self.path}: truncated: its tensors need {end} bytes, the file has {self.size}"
            )
        return metadata, tensors

    def tensor_row(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, number of the encoding, offset in the data section."""
        name = self.string()
        shape = tuple(self.scalar("Q") for _ in range(self.scalar("I")))
        return name, shape[::-1], self.scalar("I"), self.scalar("Q")

    def tensor(
        self, name: str, shape: tuple[int, ...], encoding_number: int, offset: int, data_start: int
    ) -> GGUFTensor:
        try:
            encoding = GGMLQuantizationType(encoding_number)
        except ValueError:
            raise InputError(f"{self.path}: tensor {name}: unknown encoding {encoding_number}") from None
        block, block_bytes = GGML_QUANT_SIZES[encoding]
        if not shape or shape[-1] % block:
            raise CheckpointError(f"{self.path}: corrupt: {name} {shape} is not whole {encoding.name} blocks")
        size = math.prod(shape) // block * block_bytes
        return GGUFTensor(name, shape, encoding, data_start + offset, size)

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalar(self.code(kind))
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind == _STRING:
            return [self.string() for _ in range(count)]
        code = self.code(kind)
        return np.frombuffer(self.take(count * struct.calcsize(code)), dtype=f"<{code}").tolist()

    def code(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise CheckpointError(f"{self.path}: corrupt: metadata of type {kind}")
        return _SCALARS[kind]

    def string(self) -> str:
        try:
            return self.take(self.scalar("Q")).decode("utf-8")
        except UnicodeDecodeError:
            raise CheckpointError(f"{self.path}: corrupt: a text in its header is not UTF-8") from None

    def scalar(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(code)))[0]

    def take(self, count: int) -> bytes:
        # Checked before reading: a corrupt length must not ask for terabytes of memory.
        if count > self.size - self.file.tell():
            raise CheckpointError(f"{self.path}: truncated or corrupt: it ends inside its header")
        return self.file.read(count)
