"""A magnitude that is frozen, and one that starts from the weight before it was quantized."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM

from qdora.adapters.inject import adapted_layers, inject
from qdora.adapters.layer import AdaptedLinear
from qdora.adapters.peft_io import load_adapter, save_adapter
from qdora.config import ModelConfig
from qdora.distributed.context import DistributedContext
from qdora.errors import InputError
from qdora.models.load import load_base, load_model
from qdora.models.sources import open_checkpoint
from tests.axes import METHODS, adapter_config
from tests.tiny import tiny_config, tiny_tokenizer, write_tiny_model

from .oracle import (
    COMBINATIONS,
    assert_close,
    dense_weight,
    expected_gradients,
    gradients,
    make_layer,
    move_off_the_identity,
    relative,
)
from .test_peft_format import logits, peft_base

FROZEN = [(m, norm) for m, norm in COMBINATIONS if METHODS[m].dora and METHODS[m].update]
ORIGINAL = {"r": 4, "magnitude_start": "original"}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("method", "norm"), FROZEN)
def test_a_frozen_magnitude_is_the_closed_form(method, norm, bias):
    """Catches: an s that is frozen with m, instead of following the factors; an exact gradient that needs the
    output and finds none; a bias added in place to an output that is kept."""
    layer = make_layer(method, bias=bias, norm_gradient=norm, magnitude="frozen")
    x, g = torch.randn(3, 5, 24), torch.randn(3, 5, 40)
    got = gradients(layer, x, g)
    assert "m" not in got
    assert_close(got, expected_gradients(layer, x, g, exact=norm == "exact"), 1e-5)


def test_a_frozen_magnitude_in_bf16():
    """Catches: a factor that a 16-bit tile has and the product does not take back."""
    layer = make_layer("qdora", 256, 128, magnitude="frozen", dtype="bfloat16")
    x, g = torch.randn(64, 256).bfloat16(), torch.randn(64, 128).bfloat16()
    assert_close(gradients(layer, x, g), expected_gradients(layer, x, g), 2e-2)


def test_a_layer_with_a_frozen_magnitude_is_one_graph():
    """Catches: an s that is a constant of the graph, a start that breaks it."""
    torch._dynamo.reset()
    layer = make_layer("qdora", magnitude="frozen")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, g = torch.randn(6, 24), torch.randn(6, 40)
    for seed in (1, 2):
        move_off_the_identity(layer, seed)
        layer.zero_grad()
        y = compiled(x)
        y.backward(g)
        expected = expected_gradients(layer, x, g)
        del expected["x"]
        got = {"y": y, "a": layer.update.a_RI.grad, "b": layer.update.b_OR.grad}
        assert_close(got, expected, 1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_nothing_is_kept_for_the_gradient_of_a_frozen_magnitude(bias):
    """Catches: an output kept, and a sum over it made, for a gradient that nobody takes."""
    sizes = {}
    for magnitude in ("trained", "frozen"):
        layer = make_layer("qdora", 512, 384, bias=bias, magnitude=magnitude)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            layer(torch.randn(64, 512))
        sizes[magnitude] = sum(t.numel() == 64 * 384 for t in kept)
    assert sizes == {"trained": 1, "frozen": 0}


def test_a_frozen_magnitude_is_not_counted_as_trained():
    """Catches: an offset that stays a parameter, with moments and a place in every checkpoint."""
    reports = {}
    for name, changes in {"frozen": {"magnitude": "frozen"}, "none": {"dora": False}, "trained": {}}.items():
        model = LlamaForCausalLM(tiny_config())
        reports[name] = inject(model, adapter_config("qdora", r=4).model_copy(update=changes))
        names = {name.rsplit(".", 1)[-1] for name, p in model.named_parameters() if p.requires_grad}
        assert ("offset_O" in names) == (name == "trained")
    rows = 2 * (64 + 32 + 32 + 64 + 96 + 96 + 64)
    assert reports["frozen"].trainable == reports["none"].trainable == reports["trained"].trainable - rows
    assert reports["frozen"].total == reports["none"].total
    assert len(reports["frozen"].magnitude_layers) == 14


def test_a_frozen_magnitude_reaches_peft_and_comes_back(tiny_model_folder, tmp_path):
    """Catches: a file without the vector that PEFT's DoRA has, or with zeros in its place."""
    model, _ = load_base(str(tiny_model_folder), dtype="float32")
    inject(model, adapter_config(r=4, alpha=12.0, magnitude="frozen"))
    for seed, layer in enumerate(adapted_layers(model).values()):
        move_off_the_identity(layer, seed)
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(peft_base(tiny_model_folder, model), tmp_path).eval()
    assert relative(logits(theirs), logits(model)) < 1e-5
    again, _ = load_base(str(tiny_model_folder), dtype="float32")
    load_adapter(again, tmp_path)
    assert relative(logits(again), logits(model)) < 1e-6


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_magnitude_from_the_original_scales_step_zero(quantization):
    """Catches: norms of the quantized weight under another name; the confound is there to be measured."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 48)
    layer = AdaptedLinear.from_linear(linear, adapter_config(**ORIGINAL), quantization=quantization)
    original_O = linear.weight.double().norm(dim=1)
    w_OI = dense_weight(layer)
    assert relative(layer.magnitude.value(), original_O) < 1e-6
    assert relative(original_O, w_OI.norm(dim=1)) > (1e-5 if quantization == "int8" else 1e-3)
    x = torch.randn(5, 64)
    scaled_OI = (original_O / w_OI.norm(dim=1))[:, None] * w_OI
    assert relative(layer(x), x.double() @ scaled_OI.T + linear.bias.double()) < 1e-5


def test_an_unquantized_weight_is_its_own_original():
    """Catches: a start that is another one in its last bits where nothing was quantized."""
    linear = nn.Linear(64, 48).bfloat16()
    starts = [
        AdaptedLinear.from_linear(
            linear, adapter_config("dora", r=4, magnitude_start=start), quantization="none"
        ).magnitude.value()
        for start in ("quantized", "original")
    ]
    assert torch.equal(*starts)


@pytest.mark.parametrize("route", ["as it loads", "nn.Linear"])
def test_every_layer_gets_the_norms_of_its_own_original(tiny_model_folder, route):
    """Catches: a layer with the norms of another or without any; initial values written over them."""
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    expected = {name: m.weight.norm(dim=1) for name, m in plain.named_modules() if isinstance(m, nn.Linear)}
    if route == "nn.Linear":
        model = plain
        inject(model, adapter_config(**ORIGINAL), quantization="nf4")
    else:
        settings = ModelConfig(path=str(tiny_model_folder), dtype="float32")
        checkpoint = open_checkpoint(settings.path)
        model, _ = load_model(
            checkpoint, settings, DistributedContext(), lambda m: inject(m, adapter_config(**ORIGINAL))
        )
    layers = adapted_layers(model)
    assert len(layers) == 14
    for name, layer in layers.items():
        assert relative(layer.magnitude.value(), expected[name]) < 1e-6
        assert relative(layer.weight_norm(), expected[name]) > 1e-3


def test_a_lost_original_is_refused_by_name(tiny_model_folder, tmp_path):
    """Catches: a start that silently is the other one where the original weight cannot be had."""
    loaded, _ = load_base(str(tiny_model_folder))
    with pytest.raises(InputError, match=r"'original': model\.layers\.0\.self_attn\.q_proj is nf4 already"):
        inject(loaded, adapter_config(**ORIGINAL))
    assert not adapted_layers(loaded)
    write_tiny_model(tmp_path / "plain", intermediate_size=128)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    stored = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=settings, dtype=torch.float32
    ).train()
    with pytest.raises(InputError, match=r"q_proj is nf4 already, and the weight that it was quantized from"):
        inject(stored, adapter_config(**ORIGINAL))
    stored.save_pretrained(tmp_path / "stored")
    tiny_tokenizer().save_pretrained(tmp_path / "stored")
    configured = ModelConfig(path=str(tmp_path / "stored"), dtype="float32")
    with pytest.raises(InputError, match=r"q_proj is nf4 already.*; allowed there: quantized"):
        load_model(
            open_checkpoint(configured.path),
            configured,
            DistributedContext(),
            lambda m: inject(m, adapter_config(**ORIGINAL)),
        )
