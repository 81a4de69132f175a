"""One adapter over quantized layers and the dense output layer, and the vocabularies of both sides."""

from __future__ import annotations

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PhiConfig, PhiForCausalLM

from qdora.adapters.inject import adapted_layers, inject
from qdora.adapters.peft_io import load_adapter, save_adapter
from qdora.errors import CheckpointError, InputError
from qdora.export.merged import merge_and_export, merged_onto
from qdora.models.load import load_base
from qdora.models.sources import open_checkpoint
from tests.axes import adapter_config
from tests.tiny import write_tiny_model

from .oracle import dense_weight, move_off_the_identity, relative

IDS = torch.arange(4, 28).view(2, 12)
TARGETS = ("q_proj", "lm_head")


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("models") / "untied", tie_word_embeddings=False)


def loaded(folder, quantization="none"):
    return load_base(str(folder), quantization=quantization, dtype="float32")[0]


def plain(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def with_bias(seed=0):
    """A model whose output layer has a bias, as Phi's has."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = PhiForCausalLM(PhiConfig(**sizes, vocab_size=100, pad_token_id=0))
    model.lm_head.bias.data.normal_()
    return model


def peft_adapter(base, folder, **settings):
    """An adapter that PEFT trained a little, on the output layer too."""
    torch.manual_seed(0)
    theirs = peft.get_peft_model(base, peft.LoraConfig(**{"r": 4, "target_modules": [*TARGETS]} | settings))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(folder)
    return theirs.eval()


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_an_adapter_over_layers_of_both_kinds(untied, tmp_path, quantization):
    """Catches: an adapter whose layers are not all quantized, that trains and then does not load, is not
    merged, or is another one in PEFT."""
    model = loaded(untied, quantization)
    before = logits(model)
    inject(model, adapter_config(r=4, alpha=12.0, targets=TARGETS))
    assert relative(logits(model), before) < 1e-5
    for seed, layer in enumerate(adapted_layers(model).values()):
        move_off_the_identity(layer, seed)
    head = adapted_layers(model)["lm_head"]
    assert head.base.quantization == "none"
    save_adapter(model, tmp_path / "adapter")
    again = loaded(untied, quantization)
    load_adapter(again, tmp_path / "adapter")
    assert relative(logits(again), logits(model)) < 1e-6
    base = plain(untied)
    for name, layer in model.named_modules():
        if hasattr(layer, "base"):
            base.get_submodule(name).weight.data = dense_weight(layer).float()
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert relative(logits(theirs), logits(model)) < 1e-5
    merge_and_export(model, None, tmp_path / "merged")
    assert relative(logits(plain(tmp_path / "merged")), logits(model)) < 5e-3
    original = dict(merged_onto(model, open_checkpoint(str(untied)).tensors(), torch.float32))
    assert relative(original["lm_head.weight"], head.merged(torch.float32)) < 1e-6


def test_the_base_weight_that_peft_saves_beside_an_output_layers_adapter(untied, tmp_path):
    """Catches: every PEFT adapter on the output layer refused for the copy of the base that PEFT adds; a
    copy that was changed, passed over."""
    theirs = peft_adapter(plain(untied), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors, key = load_file(path), "base_model.model.lm_head.base_layer.weight"
    for stored in (tensors[key], tensors[key].bfloat16(), tensors[key].half()):
        save_file(tensors | {key: stored}, path, {"format": "pt"})
        model = loaded(untied)
        load_adapter(model, tmp_path)
        assert relative(logits(model), logits(theirs)) < 1e-5
    for change in (
        {key: tensors[key] * 1.01},
        {"base_model.model.model.embed_tokens.weight": tensors[key].clone()},
    ):
        save_file(tensors | change, path, {"format": "pt"})
        with pytest.raises(
            InputError, match=r"has a weight of (lm_head|model\.embed_tokens) that is not the base's"
        ):
            load_adapter(loaded(untied), tmp_path)


@pytest.mark.parametrize("saved", [True, False])
def test_vera_on_the_output_layer(untied, tmp_path, saved):
    """Catches: the copy of the output layer taken for VeRA's matrices, which then seem missing; matrices
    that the settings say are there, drawn from the seed instead."""
    torch.manual_seed(0)
    config = peft.VeraConfig(r=4, target_modules=[*TARGETS], save_projection=saved)
    theirs = peft.get_peft_model(plain(untied), config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "vera_lambda" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(tmp_path)
    model = loaded(untied)
    load_adapter(model, tmp_path)
    assert relative(logits(model), logits(theirs.eval())) < 1e-5
    if saved:
        path = tmp_path / "adapter_model.safetensors"
        save_file(
            {key: t for key, t in load_file(path).items() if "vera_A" not in key and "vera_B" not in key},
            path,
        )
        with pytest.raises(CheckpointError, match=r"base_model\.vera_A is missing"):
            load_adapter(loaded(untied), tmp_path)


@pytest.mark.parametrize("init", [True, "olora", "pissa"])
@pytest.mark.parametrize("make", [plain, with_bias])
def test_the_copy_of_an_output_layer_that_peft_changed(untied, tmp_path, make, init):
    """Catches: the residual beside factors made of the output layer taken for a trained weight; its bias."""
    argument = untied if make is plain else 0
    theirs = peft_adapter(make(argument), tmp_path, init_lora_weights=init)
    model = make(argument).eval()
    load_adapter(model, tmp_path)
    assert relative(logits(model), logits(theirs)) < 1e-5
    if make is with_bias:
        other = with_bias()
        other.lm_head.bias.data.mul_(1.01)
        with pytest.raises(InputError, match=r"has a bias of lm_head that is not the base's"):
            load_adapter(other, tmp_path)


@pytest.mark.parametrize(
    ("targets", "copies"), [(("q_proj",), True), (TARGETS, True), (TARGETS, False)], ids=str
)
def test_another_vocabulary_is_named(untied, tmp_path, targets, copies):
    """Catches: 'not part of a supported adapter' where the vocabulary was resized."""
    base = plain(untied)
    base.resize_token_embeddings(105)
    theirs = peft_adapter(base, tmp_path / "adapter", target_modules=[*targets])
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=copies)
    words = (
        r"trained with a vocabulary of 105 tokens \(rows of .*\), the model's has 100: save the resized base"
    )
    with pytest.raises(InputError, match=words):
        load_adapter(loaded(untied, "nf4"), tmp_path / "adapter")
    base = plain(untied)
    base.resize_token_embeddings(105)
    base.save_pretrained(tmp_path / "resized")
    model = loaded(tmp_path / "resized")
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    load_adapter(model, tmp_path / "adapter")


def test_a_tied_output_layer_of_an_adapter_is_refused(tiny_model_folder, tmp_path):
    """Catches: an adapter of the output layer put on the embedding as well."""
    peft_adapter(plain(tiny_model_folder), tmp_path)
    with pytest.raises(InputError, match=r"lm_head shares its weight with model\.embed_tokens"):
        load_adapter(loaded(tiny_model_folder, "nf4"), tmp_path)
