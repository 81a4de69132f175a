"""The gate on a low-rank update: in the norm, in 16 bits, and in a file that PEFT reads.

Its gradient and every path of the product are in the tables of `test_closed_form` and `test_sixteen_bits`.
"""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from qdora.adapters import kernels
from qdora.adapters.inject import adapted_layers, inject
from qdora.adapters.layer import AdaptedLinear
from qdora.adapters.peft_io import load_adapter, save_adapter
from qdora.errors import CheckpointError, InputError
from qdora.models.load import load_base
from tests.axes import METHODS, adapter_config

from .oracle import ClosedForm, expected_gradients, gradients, make_layer, move_off_the_identity, relative
from .test_peft_format import logits, peft_base

GATED = ["gated", "qgated", "gdora", "qgdora"]


def adapted(folder, method, **changes):
    model, _ = load_base(str(folder), quantization=METHODS[method].quantization, dtype="float32")
    inject(model, adapter_config(**({"method": method, "r": 4, "alpha": 12.0} | changes)))
    for seed, layer in enumerate(adapted_layers(model).values()):
        move_off_the_identity(layer, seed)
    return model


def test_a_fresh_gate_is_open():
    """Catches: a gate that starts at 0, or is drawn: the update would start as another one than LoRA's."""
    torch.manual_seed(3)
    layers = [
        AdaptedLinear.from_linear(nn.Linear(24, 40), adapter_config(method, r=4), seed=5)
        for method in ("gated", "lora")
    ]
    assert layers[0].update.gate() == 1.0
    assert torch.equal(layers[0].update.a_RI, layers[1].update.a_RI)


def test_the_norm_follows_the_gate():
    """Catches: a norm that is kept when the gate alone has moved, as a vector made for each pass hides."""
    layer = make_layer("qgdora")
    x = torch.randn(5, 24)
    for offset in (0.5, 0.25, -3.0):
        with torch.no_grad():
            layer.update.gate_offset.fill_(offset)
            assert relative(layer(x), ClosedForm(layer)(x.double())) < 1e-5
            assert relative(layer.merged(torch.float32) @ x.T, (layer(x) - layer.bias).T) < 1e-5


@pytest.mark.parametrize("has_kernels", [False, True])
@pytest.mark.parametrize("method", GATED)
def test_a_small_move_of_the_gate_comes_through_in_bf16(method, has_kernels, monkeypatch):
    """Catches: a gate that is rounded to bf16, or that multiplies numbers which round back to where they
    were: a move of 1e-3 is a quarter of their spacing."""
    monkeypatch.setattr(kernels, "available", lambda device: has_kernels)
    layer = make_layer(method, 256, 128, bias=False, dtype="bfloat16", r=16, alpha=160.0)
    x, g = torch.randn(512, 256).bfloat16(), torch.randn(512, 128).bfloat16()
    with torch.no_grad():
        # The stored offset is exact, so that what moves is what was asked for.
        layer.update.gate_offset.fill_(0.0)
    start, exact_start = gradients(layer, x, g), expected_gradients(layer, x, g)
    layer.zero_grad()
    with torch.no_grad():
        layer.update.gate_offset.fill_(2.0**-10)
    moved, exact_moved = gradients(layer, x, g), expected_gradients(layer, x, g)
    change = (exact_moved["y"] - exact_start["y"]).flatten()
    share = float((moved["y"] - start["y"]).double().flatten() @ change / change.square().sum())
    assert share == pytest.approx(1, abs=0.1)
    assert relative(moved["gate"], exact_moved["gate"]) < 2e-2


def test_the_gradient_of_the_gate_is_not_rounded():
    """Catches: a float32 gradient that comes back through a bf16 parameter's own dtype."""
    layer = make_layer("qgdora", dtype="bfloat16")
    x, g = torch.randn(6, 24), torch.randn(6, 40)
    got, expected = gradients(layer, x, g)["gate"], expected_gradients(layer, x, g)["gate"]
    assert got.dtype == torch.float32
    assert relative(got, expected) < 1e-5


@pytest.mark.parametrize("method", ["gated", "qgdora"])
def test_a_gated_layer_is_one_graph(method):
    """Catches: a gate that breaks the graph of a compiled layer, or is a constant in it."""
    torch._dynamo.reset()
    layer = make_layer(method)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, g = torch.randn(6, 24), torch.randn(6, 40)
    for offset in (0.5, -0.25):
        with torch.no_grad():
            layer.update.gate_offset.fill_(offset)
        layer.zero_grad()
        compiled(x).backward(g)
        own = {name: p.grad.clone() for name, p in layer.named_parameters() if p.requires_grad}
        layer.zero_grad()
        expected = gradients(layer, x, g)
        assert relative(compiled(x), expected["y"]) < 1e-6
        assert relative(own["update.gate_offset"], expected["gate"]) < 1e-5


@pytest.mark.parametrize("method", GATED)
def test_peft_reproduces_the_gated_update(tiny_model_folder, tmp_path, method):
    """Catches: a gate that PEFT does not see, a scale with it twice, a layer's own rank or alpha lost."""
    patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"*.0.*": 3.0}}
    model = adapted(tiny_model_folder, method, **patterns)
    gates = [layer.update.gate() for layer in adapted_layers(model).values()]
    assert min(gates) < 0 < max(gates)
    save_adapter(model, tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA"
    assert list(settings["gates"].values()) == gates
    theirs = peft.PeftModel.from_pretrained(peft_base(tiny_model_folder, model), tmp_path).eval()
    assert relative(logits(theirs), logits(model)) < 1e-5


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("gated", {}),
        ("qgdora", {"alpha_pattern": {"v_proj": 20.0}, "rslora": True}),
        ("gdora", {"init": "pissa"}),
        ("qgdora", {"magnitude_targets": ("v_proj", "up_proj")}),
    ],
)
def test_a_gated_adapter_is_the_same_after_a_round_trip(tiny_model_folder, tmp_path, method, changes):
    """Catches: a gate folded into B or alpha for good, so that it starts anew at 1; a residual lost."""
    model = adapted(tiny_model_folder, method, **changes)
    save_adapter(model, tmp_path / "one")
    again, _ = load_base(str(tiny_model_folder), quantization=METHODS[method].quantization, dtype="float32")
    load_adapter(again, tmp_path / "one")
    assert torch.equal(logits(again), logits(model))
    for name, layer in adapted_layers(again).items():
        own = adapted_layers(model)[name].update
        if own is not None:
            assert (layer.update.gate(), layer.update.scale) == (own.gate(), own.scale)
    save_adapter(again, tmp_path / "two")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_half_gated_file_is_refused(tiny_model_folder, tmp_path):
    """Catches: a layer without its gate taken for a plain one, alpha with a gate taken for one without."""
    save_adapter(adapted(tiny_model_folder, "qgdora"), tmp_path)
    model, _ = load_base(str(tiny_model_folder), dtype="float32")
    path = tmp_path / "adapter_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in settings.items() if key != "ungated"}))
    with pytest.raises(InputError, match="setting 'ungated' is missing"):
        load_adapter(model, tmp_path)
    path.write_text(json.dumps(settings))
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    del tensors["base_model.model.model.layers.1.mlp.up_proj.gate_offset"]
    save_file(tensors, weights)
    with pytest.raises(CheckpointError, match=r"up_proj lacks gate_offset"):
        load_adapter(model, tmp_path)


def test_a_plain_adapter_of_peft_has_no_gate(tiny_model_folder, tmp_path):
    """Catches: LoRA's files read as gated ones that lack a tensor."""
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    peft.get_peft_model(plain, peft.LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path)
    model, _ = load_base(str(tiny_model_folder), dtype="float32")
    load_adapter(model, tmp_path)
    assert {type(layer.update).kind for layer in adapted_layers(model).values()} == {"lora"}
