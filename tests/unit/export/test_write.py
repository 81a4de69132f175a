"""What an export leaves on disk, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qdora.adapters.inject import adapted_layers, inject
from qdora.config import AdapterConfig
from qdora.errors import InputError
from qdora.export.merged import merge_and_export
from qdora.models.formats import write
from qdora.models.load import load_base
from tests.tiny import write_tiny_model
from tests.unit.adapters.oracle import move_off_the_identity, relative

IDS = torch.arange(4, 28).view(2, 12)


def adapted(folder):
    model, tokenizer = load_base(str(folder), dtype="float32")
    inject(model, AdapterConfig(r=4, alpha=12))
    for seed, layer in enumerate(adapted_layers(model).values()):
        move_off_the_identity(layer, seed)
    return model, tokenizer


def test_a_folder_in_use_is_refused_and_replaced_on_request(tiny_model_folder, tmp_path):
    """Catches: an export that mixes with the files of an earlier one."""
    model, tokenizer = adapted(tiny_model_folder)
    out = tmp_path / "out"
    out.mkdir()
    merge_and_export(model, tokenizer, out, "bf16")
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    (out / "model-00001-of-00009.safetensors").write_text("stale")
    with pytest.raises(InputError, match=r"already exists and is not empty.*--overwrite"):
        merge_and_export(model, tokenizer, out)
    with pytest.raises(InputError, match="dtype 'fp8'; allowed: fp16, bf16, fp32"):
        merge_and_export(model, tokenizer, out, "fp8", overwrite=True)
    assert (out / "model-00001-of-00009.safetensors").is_file()
    merge_and_export(model, tokenizer, out, overwrite=True)
    assert not (out / "model-00001-of-00009.safetensors").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert AutoTokenizer.from_pretrained(out)("a+b").input_ids == tokenizer("a+b").input_ids


@pytest.mark.parametrize("tied", [True, False])
def test_the_index_of_shards_is_that_of_their_contents(tmp_path, monkeypatch, tied):
    """Catches: a tensor twice or nowhere, a shard larger than asked, a wrong total."""
    monkeypatch.setattr(write, "SHARD_BYTES", 20_000)
    model, _ = adapted(write_tiny_model(tmp_path / "m", tie_word_embeddings=tied))
    merge_and_export(model, None, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    held = {p.name: load_file(p) for p in (tmp_path / "out").glob("*.safetensors")}
    assert {n: s for s, tensors in held.items() for n in tensors} == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(t.nbytes for s in held.values() for t in s.values())
    assert ("lm_head.weight" in index["weight_map"]) != tied
    assert all(len(s) == 1 or sum(t.nbytes for t in s.values()) <= 20_000 for s in held.values())
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        assert relative(exported(input_ids=IDS).logits, model(input_ids=IDS).logits) < 1e-2


def test_exporting_changes_nothing_in_the_model(tiny_model_folder, tmp_path):
    """Catches: a merge that writes into the weights or settings it reads."""
    model, _ = adapted(tiny_model_folder)
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        merge_and_export(model, None, tmp_path / "out")
        assert torch.equal(model(input_ids=IDS).logits, before)
    assert model.config.dtype != torch.float16


def test_the_exported_config_says_nothing_of_quantization(tiny_model_folder, tmp_path):
    """Catches: merged 16-bit weights that transformers takes for the 4-bit ones of the adopted model."""
    model, _ = adapted(tiny_model_folder)
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    merge_and_export(model, None, tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert model.config.quantization_config["load_in_4bit"]
