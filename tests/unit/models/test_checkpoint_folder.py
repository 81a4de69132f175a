"""Safetensors model folders: what is read, what is refused, and how much memory it takes."""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qdora.errors import CheckpointError, InputError
from qdora.models.formats.safetensors import SafetensorsFolder
from tests.tiny import tiny_config, tiny_tokenizer

INDEX = "model.safetensors.index.json"


def tiny_model(tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config(vocab_size=128, tie_word_embeddings=tied))


def saved(folder: Path, *, tied: bool = False, shard_size: str = "1GB") -> LlamaForCausalLM:
    model = tiny_model(tied)
    model.save_pretrained(folder, max_shard_size=shard_size)
    return model


def opened(folder: Path) -> SafetensorsFolder:
    return SafetensorsFolder.open(folder, str(folder))


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("shard_size", ["1GB", "60KB"])
def test_streams_every_parameter(tmp_path: Path, shard_size: str) -> None:
    """Catches: a shard read with another shard's offsets, or left out."""
    expected = saved(tmp_path, shard_size=shard_size).state_dict()
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or shard_size == "1GB"
    checkpoint = opened(tmp_path)
    streamed = dict(checkpoint.tensors())
    assert list(streamed) == checkpoint.names()
    assert streamed.keys() == expected.keys()
    assert all(torch.equal(streamed[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, torch.float16, torch.float64, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn],
)
def test_dtype_and_shape_of_the_file(tmp_path: Path, dtype: torch.dtype) -> None:
    """Catches: bytes read as another dtype, a scalar or an empty tensor losing its shape."""
    saved(tmp_path)
    numbers = torch.arange(12).reshape(3, 4).to(dtype)
    stored = {"matrix": numbers, "scalar": numbers[1, 1].clone(), "empty": numbers[:0].clone()}
    save_file(stored, tmp_path / "model.safetensors")
    streamed = dict(opened(tmp_path).tensors())
    for name, tensor in stored.items():
        assert streamed[name].dtype == dtype
        assert streamed[name].shape == tensor.shape
        assert torch.equal(streamed[name].to(torch.float64), tensor.to(torch.float64))


def test_tied_embeddings_have_no_output_matrix(tmp_path: Path) -> None:
    """Catches: inventing an lm_head.weight, or losing the flag that says to tie it."""
    saved(tmp_path, tied=True)
    checkpoint = opened(tmp_path)
    assert "lm_head.weight" not in checkpoint.names()
    assert checkpoint.config.tie_word_embeddings


def test_stored_rotary_frequencies_are_left_out(tmp_path: Path) -> None:
    """Catches: LLaMA 1 and 2 exports failing on a tensor that no model has."""
    saved(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file(load_file(path) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}, path)
    assert not any("inv_freq" in name for name in opened(tmp_path).names())


def test_bitsandbytes_folder_keeps_packed_bytes_and_its_quantization(tmp_path: Path) -> None:
    """Catches: a prequantized folder losing its quantization_config or its packed dtype."""
    saved(tmp_path)
    edit_json(
        tmp_path / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}
    )
    save_file({"w": torch.arange(6, dtype=torch.uint8).reshape(6, 1)}, tmp_path / "model.safetensors")
    checkpoint = opened(tmp_path)
    assert checkpoint.quantization is not None
    assert checkpoint.quantization["load_in_4bit"] is True
    ((_, packed),) = checkpoint.tensors()
    assert packed.dtype == torch.uint8
    assert packed.flatten().tolist() == list(range(6))


def test_plain_folder_has_no_quantization(tmp_path: Path) -> None:
    """Catches: a plain model taken for a quantized one."""
    saved(tmp_path)
    assert opened(tmp_path).quantization is None


def test_one_tensor_alive_while_streaming(tmp_path: Path) -> None:
    """Catches: the stream keeping what it handed out, so that the 16-bit model piles up."""
    saved(tmp_path, shard_size="60KB")
    alive: list[weakref.ref[torch.Tensor]] = []
    stream = opened(tmp_path).tensors()
    for _, tensor in stream:
        assert not any(earlier() is not None for earlier in alive)
        alive.append(weakref.ref(tensor))
        del tensor
    assert len(alive) > 10


def test_streaming_does_not_make_the_file_resident(tmp_path: Path) -> None:
    """Catches: mapping the file (safe_open), after which all of it counts as the process's memory."""
    saved(tmp_path)
    save_file({f"t{i}": torch.ones(1024, 1024) for i in range(24)}, tmp_path / "model.safetensors")
    checkpoint = opened(tmp_path)
    before = psutil.Process().memory_info().rss
    for _, tensor in checkpoint.tensors():
        assert tensor.sum() == 1024 * 1024
    assert psutil.Process().memory_info().rss - before < 32e6


def test_truncated_shard_is_named(tmp_path: Path) -> None:
    """Catches: a half-downloaded shard passing the check, or an error that does not say which one."""
    saved(tmp_path, shard_size="60KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    whole = shard.read_bytes()
    for length in (0, 4, 20, len(whole) // 2, len(whole) - 1):
        shard.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=shard.name):
            opened(tmp_path)


def test_corrupt_header_is_named(tmp_path: Path) -> None:
    """Catches: a SafetensorError traceback, or a header length of terabytes being believed."""
    saved(tmp_path)
    path = tmp_path / "model.safetensors"
    for garbage in (b"\xff" * 200, b"\x10" + b"\0" * 7 + b"not json at all!" + b"\0" * 64):
        path.write_bytes(garbage)
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            opened(tmp_path)


def test_file_cut_after_opening(tmp_path: Path) -> None:
    """Catches: a short read turning into a tensor of uninitialized values."""
    saved(tmp_path)
    checkpoint = opened(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        list(checkpoint.tensors())


def test_missing_shards_are_named(tmp_path: Path) -> None:
    """Catches: silently loading the shards that are there."""
    saved(tmp_path, shard_size="60KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        opened(tmp_path)


def test_index_at_odds_with_its_shards(tmp_path: Path) -> None:
    """Catches: an index from another model: tensors elsewhere, unlisted, or stored twice."""
    saved(tmp_path, shard_size="60KB")
    index = tmp_path / INDEX
    shard_of = json.loads(index.read_text())["weight_map"]
    first = next(iter(shard_of))
    last = next(name for name, shard in shard_of.items() if shard != shard_of[first])
    edit_json(index, weight_map=shard_of | {first: shard_of[last]})
    with pytest.raises(CheckpointError, match=first):
        opened(tmp_path)
    edit_json(index, weight_map={name: shard for name, shard in shard_of.items() if name != first})
    with pytest.raises(CheckpointError, match=f"does not list {first}"):
        opened(tmp_path)
    edit_json(index, weight_map=shard_of)
    doubled = load_file(tmp_path / shard_of[last]) | {first: torch.ones(1)}
    save_file(doubled, tmp_path / shard_of[last])
    with pytest.raises(CheckpointError, match=f"{first} stored in more than one shard"):
        opened(tmp_path)


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/x.safetensors", "model.bin"])
def test_index_leading_elsewhere_is_refused(tmp_path: Path, shard: str) -> None:
    """Catches: an index that makes us read outside of the folder, or load a pickle."""
    saved(tmp_path, shard_size="60KB")
    edit_json(tmp_path / INDEX, weight_map={"x": shard})
    with pytest.raises(CheckpointError, match="is not the name of a safetensors file"):
        opened(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {}}'])
def test_unusable_index(tmp_path: Path, content: str) -> None:
    """Catches: a JSON or KeyError traceback for a damaged index."""
    saved(tmp_path, shard_size="60KB")
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match=INDEX):
        opened(tmp_path)


def test_pickle_only_folder_is_refused(tmp_path: Path) -> None:
    """Catches: torch.load on a downloaded pickle, or a message that does not say why not."""
    tiny_model().config.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(InputError, match=r"only as pickle \(pytorch_model\.bin\)"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("present", "message"),
    [("", "no weights"), ("other.safetensors", "found other"), ("m.gguf", r"name it: .*m\.gguf")],
)
def test_folder_without_weights(tmp_path: Path, present: str, message: str) -> None:
    """Catches: a folder without weights reported as anything else."""
    tiny_model().config.save_pretrained(tmp_path)
    if present:
        (tmp_path / present).write_bytes(b"x")
    with pytest.raises(InputError, match=message):
        opened(tmp_path)


def test_remote_code_is_refused(tmp_path: Path) -> None:
    """Catches: code of the model being run, or a question on the terminal whether to run it."""
    saved(tmp_path)
    witness = tmp_path / "witness"
    (tmp_path / "configuration_evil.py").write_text(f"open({str(witness)!r}, 'w')\nclass EvilConfig: pass\n")
    edit_json(
        tmp_path / "config.json", model_type="evil", auto_map={"AutoConfig": "configuration_evil.EvilConfig"}
    )
    with pytest.raises(InputError, match="auto_map"):
        opened(tmp_path)
    edit_json(tmp_path / "config.json", model_type="llama")
    assert opened(tmp_path).config.model_type == "llama"
    assert not witness.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"model_type": "lama"}', "did you mean 'llama'"),
        ("{}", "model_type None is unknown"),
        ("{", "not valid JSON"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "cannot be used"),
        (
            '{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}',
            "quantized by GPTQ cannot be read; allowed: bitsandbytes",
        ),
    ],
)
def test_unusable_config(tmp_path: Path, content: str, message: str) -> None:
    """Catches: a traceback from inside transformers for a config.json that cannot be used."""
    saved(tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=message):
        opened(tmp_path)


def test_folder_without_config(tmp_path: Path) -> None:
    """Catches: an adapter folder given as a model without a hint what to give."""
    with pytest.raises(InputError, match=r"no config\.json"):
        opened(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="give its base model"):
        opened(tmp_path)


def test_tokenizer_and_generation_config_are_optional(tmp_path: Path) -> None:
    """Catches: a folder without a tokenizer failing to load, settings lost that early models keep apart."""
    saved(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    checkpoint = opened(tmp_path)
    assert checkpoint.tokenizer() is None
    tree = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(tree | {"temperature": 0.5, "eos_token_id": 7}))
    generation = checkpoint.generation_config()
    assert generation is not None
    assert (generation.temperature, generation.eos_token_id) == (0.5, 7)

    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(tmp_path)
    GenerationConfig(eos_token_id=[1, 2]).save_pretrained(tmp_path)
    tokenizer, generation = checkpoint.tokenizer(), checkpoint.generation_config()
    assert tokenizer is not None
    assert tokenizer("a")["input_ids"] == [0]
    assert generation is not None
    assert generation.eos_token_id == [1, 2]


def test_damaged_tokenizer_and_generation_config(tmp_path: Path) -> None:
    """Catches: a traceback from inside a tokenizer library."""
    saved(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(InputError, match="tokenizer cannot be used"):
        opened(tmp_path).tokenizer()
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        opened(tmp_path).generation_config()
    tiny_tokenizer().save_pretrained(tmp_path)
    edit_json(tmp_path / "tokenizer_config.json", model_max_length=[[]])
    with pytest.raises(InputError, match=r"tokenizer cannot be used: .*not supported between"):
        opened(tmp_path).tokenizer()
