"""A base model in one GGUF file, dequantized tensor by tensor."""

from __future__ import annotations

import math
import re
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
from tokenizers import pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from qdora.errors import CheckpointError, InputError
from qdora.models.formats import Checkpoint, TensorFacts, read_bytes
from qdora.models.formats.gguf_config import gguf_config

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK = {
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
_QWEN2_BIASES = {f"attn_{part}.bias": f"self_attn.{part}_proj.bias" for part in "qkv"}

_ROPE_FACTORS = "rope_freqs.weight"
_EMBEDDING = "token_embd.weight"
_OUTPUT = "output.weight"

_PLAIN = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}


@dataclass(frozen=True)
class GGUFFile(Checkpoint):
    """A GGUF file of the llama (LLaMA, Mistral, SmolLM) or qwen2 architecture.

    Attributes:
        header: metadata and tensor places.
        places: tensor place by the name in `transformers`, in file order.
    """

    header: Header
    places: dict[str, TensorPlace]

    @classmethod
    def open(cls, path: Path, origin: str) -> GGUFFile:
        """Open and check a GGUF file.

        Raises: CheckpointError: not GGUF, truncated or corrupt.
            InputError: an architecture, encoding or tensor that is not supported.
        """
        header = read_header(path)
        by_name = {place.name: place for place in header.tensors}
        factors = _read_plain(path, by_name.pop(_ROPE_FACTORS)) if _ROPE_FACTORS in by_name else None
        if _EMBEDDING not in by_name:
            raise CheckpointError(f"{path}: corrupt: it has no tensor {_EMBEDDING}")
        vocab_size = by_name[_EMBEDDING].shape[0]
        config = gguf_config(path, header.metadata, vocab_size, _OUTPUT not in by_name, factors)
        _check_encodings(path, header)
        places = {_name_of(path, name, config.model_type): place for name, place in by_name.items()}
        return cls(origin, path, config, header, dict(sorted(places.items(), key=lambda item: item[1].start)))

    def names(self) -> list[str]:
        return list(self.places)

    def facts(self, name: str) -> TensorFacts:
        place = self.places[name]
        return TensorFacts(tuple(place.shape), _PLAIN.get(place.kind, torch.float32))

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """Plain encodings keep their dtype; quantized ones are dequantized to float32.

        The file is read one tensor at a time, whatever rows are wanted: their order changes.
        """
        tensor = self._in_head_order(name, _read_plain(self.path, self.places[name]))
        return tensor if rows is None or not tensor.dim() else tensor[rows].clone()

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        if "tokenizer.ggml.tokens" not in self.header.metadata:
            return None
        try:
            tokenizer = _tokenizer_of(self.path)
        except Exception as error:
            raise InputError(f"{self.path}: its tokenizer cannot be read: {error}") from error
        _split_digits(tokenizer, self.header.metadata)
        return tokenizer

    def generation_config(self) -> GenerationConfig | None:
        tokens = {key: getattr(self.config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        generation: GenerationConfig = GenerationConfig.from_dict(tokens)
        return generation

    def _in_head_order(self, name: str, w_OI: torch.Tensor) -> torch.Tensor:
        if self.config.model_type != "llama":
            return w_OI
        if name.endswith("q_proj.weight"):
            heads = self.config.num_attention_heads
        elif name.endswith("k_proj.weight"):
            heads = self.config.num_key_value_heads
        else:
            return w_OI
        if w_OI.shape[0] % (2 * heads):
            raise CheckpointError(
                f"{self.path}: {name} {tuple(w_OI.shape)} does not divide into {heads} heads"
            )
        return _halves_from_pairs(w_OI, heads)


def _halves_from_pairs(w_OI: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows of each head: llama.cpp rotates neighbouring rows, `transformers` halves."""
    out, features = w_OI.shape
    return w_OI.view(heads, out // heads // 2, 2, features).transpose(1, 2).reshape(out, features)


def _read_plain(path: Path, place: TensorPlace) -> torch.Tensor:
    raw = read_bytes(path, place.start, place.size)
    if place.kind in _PLAIN:
        return torch.from_numpy(raw).view(_PLAIN[place.kind]).view(place.shape)
    values = dequantize(raw.reshape(*place.shape[:-1], -1), place.kind)
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))


def _check_encodings(path: Path, header: Header) -> None:
    """Refuse an encoding before an hour of streaming, not after."""
    for kind in {place.kind for place in header.tensors} - _PLAIN.keys():
        place = next(place for place in header.tensors if place.kind == kind)
        row_bytes = place.size * place.shape[-1] // np.prod(place.shape)
        try:
            dequantize(read_bytes(path, place.start, int(row_bytes)).reshape(1, -1), kind)
        except NotImplementedError:
            raise InputError(f"{path}: tensor {place.name}: encoding {kind.name} cannot be read") from None


def _name_of(path: Path, name: str, model_type: str) -> str:
    """The name in `transformers` of llama.cpp's tensor."""
    if name in _TOP:
        return _TOP[name]
    leaves = _BLOCK | (_QWEN2_BIASES if model_type == "qwen2" else {})
    block = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
    if block is None or block[2] not in leaves:
        raise InputError(f"{path}: tensor {name!r} has no place in a {model_type} model")
    return f"model.layers.{block[1]}.{leaves[block[2]]}"


def _tokenizer_of(path: Path) -> PreTrainedTokenizerBase:
    # In a folder by itself: a tokenizer.json beside the file would be taken instead.
    with tempfile.TemporaryDirectory() as alone:
        Path(alone, path.name).symlink_to(path.resolve())
        # Not AutoTokenizer: it would read the configuration of the file with the slow reader first.
        tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(
            alone, gguf_file=path.name
        )
    tokenizer.name_or_path = str(path)
    return tokenizer


def _split_digits(tokenizer: Any, metadata: dict[str, Any]) -> None:
    """Let SmolLM's tokenizer split off every digit before anything else, as the original does.

    `transformers` knows no splitting rule for `smollm` and takes GPT-2's, under which a run of
    spaces or line breaks before a number becomes other tokens than in training.
    Source: llama.cpp, LLAMA_VOCAB_PRE_TYPE_SMOLLM.
    """
    if metadata.get("tokenizer.ggml.pre") == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )


_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True)
class TensorPlace:
    """Where one tensor lies.

    Attributes:
        name: llama.cpp's name, for example `blk.0.attn_q.weight`.
        shape: in torch's order, (out, in) for a linear layer.
        kind: how its values are encoded.
        start: first byte, from the start of the file.
        size: in bytes.
    """

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int
    size: int


@dataclass(frozen=True)
class Header:
    """Metadata by llama.cpp's key, and the tensors in file order."""

    metadata: dict[str, Any]
    tensors: tuple[TensorPlace, ...]


def read_header(path: Path) -> Header:
    """Read and check the header of a GGUF file.

    Raises: CheckpointError: not a GGUF file, truncated or corrupt.
        InputError: a version, byte order or encoding that cannot be read.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            return _HeaderReader(path, file, size).header()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None


class _HeaderReader:
    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.file, self.size = path, file, size

    def header(self) -> Header:
        if self.size < 4 or self.take(4) != b"GGUF":
            raise CheckpointError(f"{self.path}: not a GGUF file (it does not begin with 'GGUF')")
        version = self.scalar("I")
        if version not in _VERSIONS:
            order = "big-endian " if version & 0xFFFF == 0 else ""
            raise InputError(f"{self.path}: {order}GGUF version {version}; readable: little-endian 2 and 3")
        tensor_count, pair_count = self.scalar("Q"), self.scalar("Q")
        metadata = dict(self.pair() for _ in range(pair_count))
        rows = [self.row() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise CheckpointError(f"{self.path}: corrupt: general.alignment is {alignment!r}")
        data_start = math.ceil(self.file.tell() / alignment) * alignment
        return Header(metadata, self.places(rows, data_start))

    def places(
        self, rows: list[tuple[str, tuple[int, ...], int, int]], data_start: int
    ) -> tuple[TensorPlace, ...]:
        places = tuple(self.place(row, data_start) for row in rows)
        if len({place.name for place in places}) != len(places):
            raise CheckpointError(f"{self.path}: corrupt: a tensor name occurs twice")
        end = max((place.start + place.size for place in places), default=0)
        if end > self.size:
            raise CheckpointError(
                f"{self.path}: truncated: its tensors need {end} bytes, the file has {self.size}"
            )
        return places

    def place(self, row: tuple[str, tuple[int, ...], int, int], data_start: int) -> TensorPlace:
        name, shape, kind_number, offset = row
        try:
            kind = GGMLQuantizationType(kind_number)
        except ValueError:
            raise InputError(f"{self.path}: tensor {name}: unknown encoding {kind_number}") from None
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if not shape or shape[-1] % block:
            raise CheckpointError(f"{self.path}: corrupt: {name} {shape} is not whole {kind.name} blocks")
        return TensorPlace(name, shape, kind, data_start + offset, math.prod(shape) // block * block_bytes)

    def row(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string()
        shape = tuple(self.scalar("Q") for _ in range(self.scalar("I")))
        return name, shape[::-1], self.scalar("I"), self.scalar("Q")

    def pair(self) -> tuple[str, Any]:
        key = self.string()
        return key, self.value(self.scalar("I"))

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array(self.scalar("I"), self.scalar("Q"))
        return self.scalar(self.code(kind))

    def array(self, kind: int, count: int) -> list[Any]:
        if kind == _STRING:
            return [self.string() for _ in range(count)]
        code = self.code(kind)
        values: list[Any] = np.frombuffer(self.take(count * struct.calcsize(code)), dtype=f"<{code}").tolist()
        return values

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
