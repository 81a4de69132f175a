"""Merged weights: what they say, where they fit, and what is written."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qdora.adapters.inject import adapted_layers, inject
from qdora.errors import InputError
from qdora.export import verify
from qdora.export.merged import merge_and_export, merged_onto, merged_tensors
from qdora.export.verify import VerificationError, verify_export
from qdora.models.formats import write
from qdora.models.load import load_base
from qdora.models.sources import open_checkpoint
from tests.axes import METHODS, adapter_config
from tests.tiny import write_tiny_model
from tests.unit.adapters.oracle import move_off_the_identity, relative

IDS = torch.arange(4, 28).view(2, 12)


def adapted(folder, method="qdora"):
    quantization = METHODS[method].quantization
    model, tokenizer = load_base(str(folder), quantization=quantization, dtype="float32")
    inject(model, adapter_config(method=method, r=4, alpha=12))
    for seed, layer in enumerate(adapted_layers(model).values()):
        move_off_the_identity(layer, seed)
    return model, tokenizer


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False, "attention_bias": True}])
@pytest.mark.parametrize("method", ["lora", "dora", "qlora", "qdora"])
def test_plain_transformers_says_what_the_adapted_model_says(tmp_path, method, changes):
    """Catches: a magnitude or scale left out of the merge, a lost bias, an output layer tied wrongly."""
    model, tokenizer = adapted(write_tiny_model(tmp_path / "m", **changes), method)
    merge_and_export(model, tokenizer, tmp_path / "out")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert relative(logits(exported), logits(model)) < 5e-3
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "float16"
    assert "quantization_config" not in config
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert (tmp_path / "out" / "generation_config.json").is_file()


def test_shards(tmp_path, tiny_model_folder, monkeypatch):
    """Catches: an index that names the wrong shard, or a shard that was forgotten."""
    monkeypatch.setattr(write, "SHARD_BYTES", 30_000)
    model, _ = adapted(tiny_model_folder)
    merge_and_export(model, None, tmp_path / "out", "bf16")
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 3
    result = verify_export(tmp_path / "out", model, IDS)
    assert result.relative_error < 5e-2


def test_onto_the_original_weights(tiny_model_folder):
    """Catches: the quantized weight's norm used with the original weight."""
    model, _ = adapted(tiny_model_folder)
    originals = dict(open_checkpoint(str(tiny_model_folder)).tensors())
    merged = dict(merged_onto(model, originals.items(), torch.float16))
    name, layer = next(iter(adapted_layers(model).items()))
    d = layer.update
    w = originals[f"{name}.weight"].double() + d.scale * (d.b_OR.double() @ d.a_RI.double())
    expected = (layer.magnitude.value().double() / w.norm(dim=1))[:, None] * w
    assert relative(merged[f"{name}.weight"], expected) < 5e-4
    assert merged.keys() == originals.keys()


def test_values_beyond_float16_are_named_and_nothing_is_written(tmp_path, tiny_model_folder):
    """Catches: infinities in an export."""
    model, _ = adapted(tiny_model_folder)
    layer = adapted_layers(model)["model.layers.1.mlp.down_proj"]
    layer.magnitude.load(layer.magnitude.initial_O * 1e7)
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.down_proj\.weight: a value .*--dtype bf16"):
        merge_and_export(model, None, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("value", "kind"), [("nan", "NaN"), ("inf", "infinite values")])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_values_that_no_dtype_holds_are_named(tmp_path, tiny_model_folder, value, kind, dtype):
    """Catches: the advice to export NaN as bf16, given where bf16 was asked for."""
    model, _ = adapted(tiny_model_folder)
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[5] = float(value)
    with pytest.raises(InputError, match=rf"layers\.0\.input_layernorm\.weight: holds {kind}") as error:
        merge_and_export(model, None, tmp_path / "out", dtype)
    assert "--dtype" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_norms_that_overflow_are_refused(tmp_path, tiny_model_folder):
    """Catches: a layer whose infinite norm turns it off, in the model and in its export alike."""
    model, _ = adapted(tiny_model_folder)
    layer = adapted_layers(model)["model.layers.1.mlp.down_proj"]
    with torch.no_grad():
        layer.update.b_OR.fill_(1e30)
    with pytest.raises(InputError, match=r"values of model\.layers\.1\.mlp\.down_proj .*norm .* overflows"):
        merge_and_export(model, None, tmp_path / "out", "bf16")


def test_merging_is_lazy(tiny_model_folder):
    """Catches: all layers merged before the first is written."""
    model, _ = adapted(tiny_model_folder)
    merged: list[str] = []
    for name, layer in adapted_layers(model).items():
        original = layer.merged
        layer.merged = lambda *a, _n=name, _o=original: merged.append(_n) or _o(*a)
    stream = merged_tensors(model, torch.float16)
    while not next(stream)[0].endswith("q_proj.weight"):
        pass
    assert merged == ["model.layers.0.self_attn.q_proj"]


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False, "attention_bias": True}])
def test_verification_holds_one_module_of_the_export(tmp_path, monkeypatch, changes):
    """Catches: a second model beside the adapted one, which a card that trained in 4 bits cannot hold."""
    model, _ = adapted(write_tiny_model(tmp_path / "m", **changes))
    merge_and_export(model, None, tmp_path / "out", "fp32")
    built, peak = [], [0]
    build, materialize = verify.streamed, verify._materialize

    def watch(*arguments):
        materialize(*arguments)
        alive = [p.nbytes for p in built[0].parameters() if not p.is_meta]
        peak.append(sum(alive))

    monkeypatch.setattr(verify, "_materialize", watch)
    monkeypatch.setattr(verify, "streamed", lambda *a: built.append(build(*a)) or built[0])
    assert verify_export(tmp_path / "out", model, IDS).relative_error < 1e-5
    largest = max(sum(p.nbytes for p in m.parameters(recurse=False)) for m in built[0].modules())
    assert max(peak) == largest
    assert all(p.is_meta for p in built[0].parameters())


@pytest.mark.parametrize("factor", [1.5, float("nan"), float("inf")])
def test_verification_sees_a_changed_weight(tmp_path, tiny_model_folder, factor):
    """Catches: a verification that passes whatever was written, or passes NaN because it compares unequal."""
    model, _ = adapted(tiny_model_folder)
    merge_and_export(model, None, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.self_attn.v_proj.weight"].mul_(factor)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(VerificationError, match="exceeds the bound"):
        verify_export(tmp_path / "out", model, IDS)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("gone", [False, True])
def test_an_export_that_does_not_load_is_said(tmp_path, tiny_model_folder, name, gone):
    """Catches: a traceback where the exported folder is removed or damaged before it is verified."""
    model, _ = adapted(tiny_model_folder)
    merge_and_export(model, None, tmp_path / "out")
    (tmp_path / "out" / name).unlink() if gone else (tmp_path / "out" / name).write_bytes(b"{")
    with pytest.raises(VerificationError, match="out: transformers cannot load it: "):
        verify_export(tmp_path / "out", model, IDS)
