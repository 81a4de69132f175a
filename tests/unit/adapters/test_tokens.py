"""Trained rows of tokens, with PEFT as the other side."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, PhiConfig, PhiForCausalLM

from qdora.adapters.adapt import with_tokens
from qdora.adapters.inject import adapted_layers, adapters_off, inject
from qdora.adapters.peft_io import load_adapter, save_adapter
from qdora.adapters.saved import read_saved
from qdora.adapters.tokens import add_special_tokens, token_rows, train_tokens
from qdora.config import AdapterConfig
from qdora.data.batches import collate
from qdora.data.tokenize import TokenizedExample
from qdora.errors import InputError
from qdora.export.merged import merge_and_export
from qdora.export.verify import verify_export
from qdora.models.load import load_base
from qdora.training.loss import completion_loss
from tests.tiny import tiny_config, tiny_tokenizer, write_tiny_model

from .oracle import move_off_the_identity, relative

V = tiny_config().vocab_size
TOKENS = [5, V, V + 1]
IDS = torch.tensor([[5, 9, V, 7, V + 1, 5, 12, 6], [8, V + 1, 5, 5, 20, 30, V, 2]])


@pytest.fixture(scope="module", params=["tied", "untied"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    return write_tiny_model(path, tie_word_embeddings=request.param == "tied")


@torch.no_grad()
def logits(model, ids=IDS):
    return model(input_ids=ids).logits


def trained(folder, quantization="nf4", tokens=TOKENS, **settings):
    """A model with an adapter and rows of tokens, both off their start."""
    model, _ = load_base(str(folder), quantization=quantization, dtype="float32")
    config = AdapterConfig(r=4, alpha=12.0, targets=["q_proj", "down_proj"], **settings)
    with_tokens(model, inject(model, config), config, tokens)
    for seed, layer in enumerate(adapted_layers(model).values()):
        move_off_the_identity(layer, seed)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for rows in token_rows(model).values():
            rows.offset_KI.copy_(torch.randn(rows.offset_KI.shape, generator=generator) * 0.1)
    return model


def in_peft(folder, model, adapter):
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, layer in adapted_layers(model).items():
        with torch.no_grad():
            plain.get_submodule(name).weight.copy_(layer.base.dense(torch.float32))
    for name, module in model.named_modules():  # layers without an adapter are quantized too
        if hasattr(module, "base") and name not in adapted_layers(model):
            with torch.no_grad():
                plain.get_submodule(name).weight.copy_(module.base.dense(torch.float32))
    plain.resize_token_embeddings(V + 2)
    return peft.PeftModel.from_pretrained(plain, adapter).eval()


def test_peft_reproduces_our_logits(folder, tmp_path):
    """Catches: rows saved as their offsets, a misnamed key, rows of an untied output layer lost."""
    model = trained(folder)
    save_adapter(model, tmp_path)
    assert relative(logits(in_peft(folder, model, tmp_path)), logits(model)) < 1e-5


def test_our_own_load_again(folder, tmp_path):
    """Catches: rows that are not the same after they were saved and loaded, tables that do not grow."""
    model = trained(folder, dora=False)
    save_adapter(model, tmp_path)
    again, _ = load_base(str(folder), dtype="float32")
    load_adapter(again, tmp_path)
    assert again.config.vocab_size == V + 2 == logits(again).shape[-1]
    assert relative(logits(again), logits(model)) < 1e-6


@pytest.mark.parametrize("listed", [True, False])
def test_an_adapter_from_peft_loads_here(folder, tmp_path, listed):
    """Catches: PEFT's list of ids misread, rows of tokens that the base has refused or left out."""
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = [9, 5]
    layers = ["embed_tokens", *(["lm_head"] if "untied" in str(folder) else [])]
    named = ids if listed else dict.fromkeys(layers, ids)
    theirs = peft.get_peft_model(
        plain, peft.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=named)
    )
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name or "tokens_delta" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(tmp_path)
    model, _ = load_base(str(folder), quantization="none", dtype="float32")
    load_adapter(model, tmp_path)
    ids_BT = IDS.clamp_max(V - 1)
    assert relative(logits(model, ids_BT), logits(theirs.eval(), ids_BT)) < 1e-5
    save_adapter(model, tmp_path / "ours")
    again, _ = load_base(str(folder), quantization="none", dtype="float32")
    load_adapter(again, tmp_path / "ours")
    assert relative(logits(again, ids_BT), logits(model, ids_BT)) < 1e-6


def test_gradients_are_those_of_a_dense_table(folder):
    """Catches: a gradient from the embedding or the output layer alone, rows that take others' gradients."""
    model = trained(folder, quantization="none", dtype="float32")
    batch = collate([TokenizedExample(row, 1, "x") for row in IDS.tolist()], 0)
    ours = completion_loss(model, batch)
    ours.backward()
    dense = {}
    for name, rows in token_rows(model).items():
        layer = model.get_submodule(name)
        dense[name] = rows.into(layer.weight.detach()).requires_grad_()
    names, hooked = list(dense), list(token_rows(model).values())
    for rows in hooked:
        rows.enabled, rows.base_rows = False, V + 2  # the dense table has them all
    tables = {f"{name}.weight": table for name, table in dense.items()}
    out = torch.func.functional_call(model, tables, (), {"input_ids": IDS}, tie_weights=True).logits
    predicted = out[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(predicted, IDS[:, 1:].flatten(), reduction="sum")
    loss.backward()
    assert relative(ours, loss) < 1e-6
    for name, rows in zip(names, hooked, strict=True):
        assert relative(rows.offset_KI.grad, dense[name].grad[list(rows.ids)]) < 1e-5


def test_the_export_is_the_adapted_model(folder, tmp_path):
    """Catches: a table without the trained rows, a vocabulary size in config.json that is the base's."""
    model = trained(folder)
    merge_and_export(model, tiny_tokenizer(), tmp_path / "merged", "fp16")
    assert verify_export(tmp_path / "merged", model, IDS).relative_error < 2e-3
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert merged.config.vocab_size == V + 2


def test_where_rows_start(folder):
    """Catches: new rows at zero, whose logits and norms are no token's; known ones moved."""
    model, _ = load_base(str(folder), dtype="float32")
    before, table = logits(model, IDS.clamp_max(V - 1)), model.get_input_embeddings().weight.float()
    assert train_tokens(model, TOKENS, torch.float32) == (1 if "untied" not in str(folder) else 2) * 3 * 64
    rows = next(iter(token_rows(model).values())).value()
    assert torch.equal(rows[0], table[5])
    assert relative(rows[1], table.mean(0)) < 1e-6
    assert torch.allclose(logits(model, IDS.clamp_max(V - 1))[..., :V], before, atol=1e-6)
    with adapters_off(model):
        off = logits(model, IDS.clamp_max(V - 1))
    assert torch.equal(off[..., :V], before)
    assert off[..., V:].max() == -torch.inf  # the base cannot answer with a token that it lacks
    for rows in token_rows(model).values():
        rows.offset_KI.data += 0.5
        expected = rows.value()
        rows.load(expected)
        assert torch.equal(rows.value(), expected)


def test_a_row_of_zeros_starts_as_a_new_one(folder):
    """Catches: a row that was added to the table without a value, and that hardly learns."""
    model, _ = load_base(str(folder), quantization="none", dtype="float32")
    for table in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
        table[9] = 0
    train_tokens(model, [9, V], torch.float32)
    for rows in token_rows(model).values():
        assert torch.equal(*rows.value())
        assert rows.value().abs().min(1).values.max() > 0


SIZES = {"vocab_size": V, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
FAMILIES = {
    "scaled embedding": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    ),
    "bias of the output": lambda: PhiForCausalLM(PhiConfig(**SIZES, num_attention_heads=4)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families(tmp_path, family):
    """Catches: rows that are not scaled as the table's are, logits of tokens without their bias."""
    torch.manual_seed(0)
    plain = FAMILIES[family]()
    bias_V = getattr(plain.lm_head, "bias", None)
    if bias_V is not None:
        torch.nn.init.normal_(bias_V)
    plain.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model, _ = load_base(str(tmp_path), quantization="none", dtype="float32")
    train_tokens(model, TOKENS, torch.float32)
    plain.resize_token_embeddings(V + 2, mean_resizing=False)
    with torch.no_grad():
        for name, rows in token_rows(model).items():
            rows.offset_KI.copy_(torch.randn(rows.offset_KI.shape) * 0.1)
            table = plain.get_submodule(name).weight
            table.copy_(rows.into(table[:V]))
        if bias_V is not None:
            plain.lm_head.bias[V:] = 0
    assert relative(logits(model), logits(plain.eval())) < 1e-5


def test_an_adapter_is_known_by_its_rows_too(folder, tmp_path):
    """Catches: a resumed run that takes another adapter for the one that it went on from."""
    model = trained(folder)
    save_adapter(model, tmp_path / "first")
    with torch.no_grad():
        next(iter(token_rows(model).values())).offset_KI[0, 0] += 1
    save_adapter(model, tmp_path / "second")
    assert read_saved(tmp_path / "first").digest != read_saved(tmp_path / "second").digest


def test_tokens_of_the_tokenizer():
    """Catches: a token that the tokenizer has added again, ids in an order that the names decide, a row
    that the table grows by and that nothing trains, a token that is shown in answers."""
    tokenizer = tiny_tokenizer()
    assert add_special_tokens(tokenizer, ["<|im_end|>", "</s>", "<|im_start|>"], V) == [2, V, V + 1]
    assert tokenizer("a<|im_end|>", add_special_tokens=False)["input_ids"][-1] == V
    assert tokenizer.decode([9, V], skip_special_tokens=True) == tokenizer.decode([9])
    assert add_special_tokens(tokenizer, ["<|im_start|>"], V) == [V, V + 1]  # no row without a start
    assert add_special_tokens(tokenizer, ["<|im_start|>"], V + 2) == [V + 1]
    assert add_special_tokens(tokenizer, [], V) == []
    with pytest.raises(InputError, match="named twice"):
        add_special_tokens(tokenizer, ["x", "x"], V)


def test_refused(folder, tmp_path):
    """Catches: rows on an output layer that has an adapter, a hole among new rows filled with something."""
    model, _ = load_base(str(folder), dtype="float32")
    if "untied" in str(folder):
        inject(model, AdapterConfig(r=4, targets=["lm_head"]))
        with pytest.raises(InputError, match=r"leave lm_head out of adapter\.targets"):
            train_tokens(model, [5], torch.float32)
    save_adapter(trained(folder, tokens=[5, 7]), tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    settings["trainable_token_indices"] = {layer: [5, 5] for layer in settings["trainable_token_indices"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="expected different token ids"):
        load_adapter(load_base(str(folder), dtype="float32")[0], tmp_path)
    save_adapter(trained(folder, tokens=[5, V + 1]), tmp_path)
    other, _ = load_base(str(folder), dtype="float32")
    with pytest.raises(InputError, match="lacks some beyond those: save the resized base"):
        load_adapter(other, tmp_path)
