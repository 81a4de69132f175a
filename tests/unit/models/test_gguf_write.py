"""GGUF files that are written: held against transformers' reading of them and gguf's own quantizer."""

from __future__ import annotations

import re
import tracemalloc
import weakref
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from qdora.errors import InputError
from qdora.models.formats.gguf import GGUFFile
from qdora.models.formats.gguf_write import plan_gguf
from tests.tiny import tiny_bpe_tokenizer

Kind = gguf.GGMLQuantizationType
IDS_BT = torch.arange(4, 64).view(2, 30)
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 320}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
PLAIN = {"rope_type": "default", "rope_theta": 2e4}
MODELS = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": False, "rms_norm_eps": 1e-4}),
    "llama, tied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "mistral, wide heads": (MistralConfig, MistralForCausalLM, {"head_dim": 32, "sliding_window": None}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": False}),
    "qwen2, tied": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
}


def config_of(name: str, **changes: object) -> PreTrainedConfig:
    config_class, _, own = MODELS[name]
    return config_class(**(SIZES | HEADS | {"rope_parameters": PLAIN} | own | changes))


def model_of(name: str, **changes: object) -> PreTrainedModel:
    torch.manual_seed(0)
    model = MODELS[name][1](config_of(name, **changes)).eval()
    for parameter in model.parameters():  # norms of one and biases of zero would hide a mix-up
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def tensors_of(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    yield from ((name, parameter.detach().clone()) for name, parameter in model.named_parameters())


def written(model: PreTrainedModel, path: Path, kind: str = "f16") -> Path:
    plan_gguf(model.config, kind, tiny_bpe_tokenizer()).write(path, tensors_of(model))
    return path


def neighbouring_rows(w_OI: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of a head: halves interleaved."""
    out = w_OI.shape[0]
    return w_OI.reshape(heads, 2, out // heads // 2, -1).swapaxes(1, 2).reshape(w_OI.shape)


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=IDS_BT).logits


def with_matrices_in_float16(model: PreTrainedModel) -> PreTrainedModel:
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data = parameter.data.half().float()
    return model


@pytest.mark.parametrize("name", MODELS)
def test_transformers_reads_the_same_model(tmp_path: Path, name: str) -> None:
    """Catches: rows of q and k in the wrong order, swapped names, a lost bias, norm, head size, epsilon or
    base of the rotary embedding, an output layer tied wrongly."""
    model = with_matrices_in_float16(model_of(name))
    path = written(model, tmp_path / "m.gguf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)
    assert theirs.config.max_position_embeddings == model.config.max_position_embeddings
    read = dict(GGUFFile.open(path, str(path)).tensors())
    assert read.keys() == dict(tensors_of(model)).keys()
    assert all(torch.equal(read[name].float(), tensor) for name, tensor in tensors_of(model))


def test_rope_scaling_of_llama3(tmp_path: Path) -> None:
    """Catches: factors of the rotary frequencies that are lost, inverted or in another order."""
    model = with_matrices_in_float16(model_of("llama", rope_parameters=LLAMA3))
    path = written(model, tmp_path / "m.gguf")
    (factors,) = (t for t in gguf.GGUFReader(path).tensors if t.name == "rope_freqs.weight")
    rotary = model.model.rotary_emb
    plain, _ = rotary.compute_default_rope_parameters(model.config)
    torch.testing.assert_close(plain / torch.tensor(factors.data), rotary.inv_freq)
    assert factors.data.min() == 1.0
    assert factors.data.max() == 8.0
    assert GGUFFile.open(path, str(path)).config.rope_parameters == LLAMA3


@pytest.mark.parametrize(("kind", "encoding"), [("q8_0", Kind.Q8_0), ("q4_0", Kind.Q4_0)])
@pytest.mark.parametrize("name", ["llama", "llama, tied", "qwen2"])
def test_quantized_bytes_are_those_of_gguf(tmp_path: Path, name: str, kind: str, encoding: Kind) -> None:
    """Catches: quantization before the rows are reordered, of a rounded tensor, into the wrong place; an
    error beyond half a step; the matrix of the output layer in 4 bits."""
    model = model_of(name)
    path = written(model, tmp_path / "m.gguf", kind)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    output = "token_embd.weight" if model.config.tie_word_embeddings else "output.weight"
    assert stored[output].tensor_type == Kind.Q8_0
    assert stored["blk.0.attn_norm.weight"].tensor_type == Kind.F32
    for leaf, heads in (("q_proj", 4), ("k_proj", 2), ("o_proj", 0)):
        values = model.get_parameter(f"model.layers.1.self_attn.{leaf}.weight").detach().numpy()
        if heads and name != "qwen2":
            values = neighbouring_rows(values, heads)
        tensor = stored[f"blk.1.attn_{'output' if leaf == 'o_proj' else leaf[0]}.weight"]
        assert tensor.tensor_type == encoding
        assert np.array_equal(tensor.data, gguf.quantize(values, encoding))
        blocks = values.reshape(-1, 32)
        error = np.abs(gguf.dequantize(tensor.data, encoding).reshape(-1, 32) - blocks).max(axis=1)
        # Half a step, or a step where q4_0 ends one early; the scale, a float16, is off by 2⁻¹¹ itself.
        steps, most = (127, 0.5) if encoding == Kind.Q8_0 else (8, 1.0)
        assert (error <= np.abs(blocks).max(axis=1) / steps * (most + steps * 2**-11)).all()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    read = dict(GGUFFile.open(path, str(path)).tensors())
    assert all(torch.equal(read[n], p) for n, p in theirs.named_parameters())


def test_memory_is_that_of_one_tensor(tmp_path: Path) -> None:
    """Catches: tensors that are collected before they are written, or kept after."""
    model = model_of("llama", num_hidden_layers=8, intermediate_size=512, hidden_size=256)
    last: list[weakref.ref[torch.Tensor]] = []

    def one_at_a_time() -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in model.named_parameters():
            assert not last or last.pop()() is None, f"the tensor before {name} is still there"
            tensor = parameter.detach().clone()
            last.append(weakref.ref(tensor))
            yield name, tensor
            del tensor

    plan = plan_gguf(model.config, "q8_0", tiny_bpe_tokenizer())
    tracemalloc.start()
    plan.write(tmp_path / "m.gguf", one_at_a_time())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    largest = max(parameter.nbytes for parameter in model.parameters())
    assert peak < 1.5 * largest
    assert (tmp_path / "m.gguf").stat().st_size > 2 * largest


def test_tensors_come_in_any_order_and_all(tmp_path: Path) -> None:
    """Catches: data written by order instead of name; a file that lacks a tensor, has one twice, or one of
    another model."""
    model = model_of("llama, tied")
    written(model, tmp_path / "m.gguf")
    tensors = dict(tensors_of(model))

    def write(rows: list[tuple[str, torch.Tensor]]) -> None:
        plan_gguf(model.config, "f16", tiny_bpe_tokenizer()).write(tmp_path / "other.gguf", rows)

    left_out = [
        ("lm_head.weight", torch.ones(1)),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(1)),
    ]
    write([*reversed(tensors.items()), *left_out])
    assert (tmp_path / "other.gguf").read_bytes() == (tmp_path / "m.gguf").read_bytes()
    name, tensor = next(iter(tensors.items()))
    with pytest.raises(InputError, match=r"1 tensors are missing: model\.norm\.weight"):
        write([row for row in tensors.items() if row[0] != "model.norm.weight"])
    for rows in ([(name, tensor)] * 2, [(name, tensor[:-1])], [("model.layers.0.mlp.gate.weight", tensor)]):
        with pytest.raises(InputError, match="has no place in a llama model"):
            write(rows)


def test_values_that_do_not_fit(tmp_path: Path) -> None:
    """Catches: infinities in a file, as values or as the scale of a block."""
    model = model_of("llama, tied")
    weight = model.model.layers[1].mlp.down_proj.weight
    weight.data[3, 5] = 1e5
    with pytest.raises(
        InputError, match=r"layers\.1\.mlp\.down_proj.*does not fit.*; export with --type q8_0"
    ):
        written(model, tmp_path / "m.gguf")
    written(model, tmp_path / "m.gguf", "q8_0")
    weight.data[3, 5] = -1e6
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.down_proj.*does not fit"):
        written(model, tmp_path / "m.gguf", "q4_0")


@pytest.mark.parametrize(
    ("config", "kind", "message"),
    [
        (
            GemmaConfig(**SIZES, **HEADS),
            "f16",
            "no 'gemma' models are written; .*allowed: llama, mistral, qwen2",
        ),
        (config_of("llama", attention_bias=True), "f16", "llama with attention_bias True; allowed: False"),
        (config_of("llama", mlp_bias=True), "f16", "llama with mlp_bias True"),
        (config_of("llama", hidden_act="gelu"), "f16", "llama with hidden_act 'gelu'; allowed: 'silu'"),
        (
            config_of("llama", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
            "f16",
            "llama with rope_type 'linear'; allowed: 'default', 'llama3'",
        ),
        (
            config_of("llama", intermediate_size=72),
            "q8_0",
            r"--type q8_0: rows of 72 values \(model\.layers\.0\.mlp\.down_proj\.weight\) are no multiple",
        ),
        (config_of("llama", vocab_size=100), "f16", "beyond the 100 rows of the embedding"),
    ],
    ids=lambda value: value if isinstance(value, str) and re.fullmatch(r"\w+", value) else "",
)
def test_refused_before_weights_are_read(config: PreTrainedConfig, kind: str, message: str) -> None:
    """Catches: a model that llama.cpp would compute otherwise, without a word."""
    with pytest.raises(InputError, match=message):
        plan_gguf(config, kind, tiny_bpe_tokenizer())


def test_a_window_bounds_the_context(tmp_path: Path) -> None:
    """Catches: a context in which llama.cpp attends to tokens that the model does not."""
    model = model_of("mistral, wide heads", sliding_window=48)
    path = written(model, tmp_path / "m.gguf")
    assert GGUFFile.open(path, str(path)).config.max_position_embeddings == 48
