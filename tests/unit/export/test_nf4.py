"""4-bit exports against their readers: bitsandbytes' own serialization, transformers, PEFT."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qdora.adapters.inject import adapted_layers
from qdora.adapters.peft_io import load_adapter
from qdora.adapters.tokens import train_tokens
from qdora.errors import InputError
from qdora.export import nf4
from qdora.export.job import load_format
from qdora.export.verify import VerificationError
from qdora.models.load import load_base
from tests.tiny import write_tiny_model
from tests.unit.adapters.oracle import relative

from .jobs import exported, logits, make_job

WHOLE = {"intermediate_size": 128}
"""Rows of whole blocks everywhere."""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("nf4") / "m", **WHOLE)


def as_a_client(folder, adapter=True):
    """The export in transformers, with its adapter in PEFT; products in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu")
    nf4.widen(model)
    return peft.PeftModel.from_pretrained(model, folder / "adapter") if adapter else model


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("qdora", {}),
        ("qdora", {"quantization": "fp4"}),
        ("qdora", {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"o_proj": 3.0}}),
        ("qlora", {}),
        ("qgdora", {}),
        ("qdvora", {}),
        ("qdora", {"targets": ["q_proj"], "magnitude_targets": ["q_proj", "down_proj"]}),
    ],
)
def test_transformers_and_peft_compute_the_adapted_model(tmp_path, model_folder, method, changes):
    """Catches: s left out of the scales or of B, c twice or nowhere, another layer's factors, statistics of a
    second quantization taken for the scales, codes in another order."""
    job = make_job(tmp_path, model_folder, "nf4", method=method, dtype="fp32", **changes)
    expected = logits(job.model)
    folder = exported(job, "nf4")
    assert relative(logits(as_a_client(folder)), expected) < 1e-5
    assert job.model is not None
    said = nf4.verify(job, folder)
    assert "plain transformers loads it" in said
    assert "(bound 1e-05); merged and quantized again, all weights together differ by " in said
    assert " relative, where training moved them by " in said


def test_qdora_reads_it_back(tmp_path, model_folder):
    """Catches: a checkpoint that `evaluate` and `chat` of this package refuse."""
    job = make_job(tmp_path, model_folder, "nf4", dtype="fp32")
    expected, folder = logits(job.model), exported(job, "nf4")
    model, _ = load_base(str(folder), dtype="float32")
    load_adapter(model, folder / "adapter")
    assert relative(logits(model), expected) < 1e-5


def test_biases_an_untied_output_layer_and_a_magnitude_alone(tmp_path):
    """Catches: a bias scaled with its row, an output layer that a reader takes for a quantized one, a folder
    with an empty adapter."""
    changes = {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}
    folder = write_tiny_model(tmp_path / "m", **WHOLE, **changes)
    job = make_job(tmp_path, folder, "nf4", method="qmagnitude", dtype="fp32")
    for layer in adapted_layers(job.model).values():
        if layer.bias is not None:
            layer.bias.data.normal_(0, 0.1)
    expected = logits(job.model)
    out = exported(job, "nf4")
    assert not (out / "adapter").exists()
    assert relative(logits(as_a_client(out, adapter=False)), expected) < 1e-5


def test_an_adapted_output_layer_and_trained_tokens_are_merged(tmp_path):
    """Catches: an output layer's adapter lost, or its row in a table left untrained."""
    folder = write_tiny_model(tmp_path / "m", **WHOLE, tie_word_embeddings=False)
    targets = ["lm_head", "q_proj"]
    job = make_job(tmp_path, folder, "nf4", dtype="fp32", targets=targets)
    expected = logits(job.model)
    out = exported(job, "nf4")
    settings = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert not any("lm_head" in name for name in settings["target_modules"])
    assert relative(logits(as_a_client(out)), expected) < 1e-5


def test_trained_rows_of_tokens_are_in_the_table(tmp_path, model_folder):
    """Catches: rows of added tokens that the checkpoint lacks."""
    job = make_job(tmp_path, model_folder, "nf4", dtype="fp32")
    train_tokens(job.model, [5, job.model.config.vocab_size], torch.float32)
    job.model.model.embed_tokens.token_rows.offset_KI.data.normal_()
    expected = logits(job.model)
    assert relative(logits(as_a_client(exported(job, "nf4"))), expected) < 1e-5


def test_codes_stay_and_scales_take_s(tmp_path, model_folder):
    """Catches: a second quantization."""
    job = make_job(tmp_path, model_folder, "nf4")
    layer = adapted_layers(job.model)["model.layers.1.mlp.down_proj"]
    tensors = load_file(exported(job, "nf4") / "model.safetensors")
    weight = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(tensors[weight].view(-1), layer.base.packed.view(-1))
    w = layer.base.dense().double()
    update = layer.update
    v = w + update.scale * update.b_OR.double() @ update.a_RI.double()
    s = (layer.magnitude.value().double() / v.norm(dim=1)).detach()
    assert float((s - 1).abs().min()) > 1e-3
    expected = layer.base.scales().double().view(len(s), -1) * s[:, None]
    assert relative(tensors[f"{weight}.absmax"].view(expected.shape), expected) < 1e-6


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_the_files_are_those_of_transformers_own_4_bit_checkpoints(tmp_path, model_folder, kind):
    """Catches: a key, dtype, shape or setting that a reader of bitsandbytes' checkpoints does not find, such
    as vLLM's loader, which looks for `weight.quant_state.bitsandbytes__nf4`, `absmax` and `quant_map`."""
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind)
    theirs = AutoModelForCausalLM.from_pretrained(
        model_folder, quantization_config=settings, dtype=torch.float16, device_map="cpu"
    )
    theirs.save_pretrained(tmp_path / "theirs")
    job = make_job(tmp_path, model_folder, "nf4", quantization=kind)
    folder = exported(job, "nf4")
    one, other = (load_file(f / "model.safetensors") for f in (tmp_path / "theirs", folder))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert (tensor.dtype, tensor.shape) == (other[name].dtype, other[name].shape), name
        if "quant_state" in name:
            assert json.loads(bytes(tensor.tolist())) == json.loads(bytes(other[name].tolist())), name
        if name.endswith("quant_map"):
            assert torch.equal(tensor, other[name]), name
    read = [json.loads((f / "config.json").read_text()) for f in (tmp_path / "theirs", folder)]
    written, ours = (config["quantization_config"] for config in read)
    wanted = {"quant_method", "load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant"}
    wanted |= {"bnb_4bit_quant_storage", "load_in_8bit"}
    assert {key: ours[key] for key in wanted} == {key: written[key] for key in wanted}
    assert ours["llm_int8_skip_modules"] == ["lm_head"]


def test_rows_that_two_blocks_share_are_named(tmp_path, tiny_model_folder):
    """Catches: a row's s in a scale that belongs to the next row too."""
    job = make_job(tmp_path, tiny_model_folder, "nf4")
    with pytest.raises(InputError, match=r"0\.mlp\.down_proj has rows of 96 weights, not .* block size 64"):
        exported(job, "nf4")


def test_without_a_magnitude_any_rows_will_do(tmp_path, tiny_model_folder):
    """Catches: a QLoRA adapter refused for scales that need not change."""
    job = make_job(tmp_path, tiny_model_folder, "nf4", method="qlora", dtype="fp32")
    folder = exported(job, "nf4")
    assert nf4.layer_errors(job.model, folder, nf4._read_updates(folder)).largest < 1e-6


@pytest.mark.parametrize(("method", "quantization"), [("dora", "none"), ("qdora", "int8"), ("qdora", "nf3")])
def test_bases_without_such_codes_are_refused_and_requantized(tmp_path, model_folder, method, quantization):
    """Catches: 16-bit or 8-bit weights in a folder that says 4 bits."""
    job = make_job(tmp_path, model_folder, "nf4", method=method, quantization=quantization)
    with pytest.raises(InputError, match=f"{quantization!r}: a server .*allowed: nf4 and fp4, or --requant"):
        exported(job, "nf4")
    job.options.requantize = True
    folder = exported(job, "nf4")
    assert not (folder / "adapter").exists()
    said = nf4.verify(job, folder)
    assert 0.05 < float(said.split("differ by ")[-1].split()[0]) < 0.15


def test_verification_sees_a_wrong_scale_and_a_wrong_factor(tmp_path, model_folder):
    """Catches: a verification that passes whatever was written."""
    job = make_job(tmp_path, model_folder, "nf4")
    model, folder = job.model, exported(job, "nf4")
    for path, part in (
        ("model.safetensors", "v_proj.weight.absmax"),
        ("adapter/adapter_model.safetensors", "A"),
    ):
        kept = load_file(folder / path)
        name = next(name for name in kept if part in name)
        changed = kept | {name: kept[name] * 1.001}
        save_file(changed, folder / path, {"format": "pt"})
        job._model = model
        with pytest.raises(VerificationError, match=r"proj differs by .*; the bound is 1e-05"):
            nf4.verify(job, folder)
        save_file(kept, folder / path, {"format": "pt"})


def test_four_and_a_half_bits(tmp_path, model_folder):
    """Catches: statistics that cost more than a scale of 32 bits a block."""
    tensors = load_file(exported(make_job(tmp_path, model_folder, "nf4"), "nf4") / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert 8 * (tensors[name].nbytes + tensors[f"{name}.absmax"].nbytes) == 4.5 * 64 * 128


@pytest.mark.parametrize("form", ["merged", "lora"])
def test_a_stored_4_bit_base_has_no_original_weights(tmp_path, model_folder, form):
    """Catches: codes taken for weights by `--onto original`."""
    folder = exported(make_job(tmp_path, model_folder, "nf4"), "nf4")
    job = make_job(tmp_path / "again", folder, form, onto="original")
    with pytest.raises(InputError, match="out: holds no original weights, they are stored quantized"):
        load_format(form).check(job)
