"""How A and B start: their values, that the model is the same at step 0, and what PEFT makes of it."""

from __future__ import annotations

import json
from typing import get_args

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qdora.adapters.init import INITS
from qdora.adapters.inject import adapted_layers, inject
from qdora.adapters.peft_io import load_adapter, save_adapter
from qdora.config import InitName, ModelConfig
from qdora.distributed.context import DistributedContext
from qdora.distributed.launch import FsdpSettings
from qdora.errors import InputError
from qdora.models.load import load_base, load_model, load_with_adapter
from qdora.models.sources import open_checkpoint
from tests.axes import adapter_config

from .oracle import move_off_the_identity, relative

IDS = torch.arange(3, 51).view(2, 24)


def model_of(folder, quantization: str = "none"):
    return load_base(folder, quantization=quantization, dtype="float32")[0]


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS).logits


def trained(model):
    for seed, layer in enumerate(adapted_layers(model).values()):
        move_off_the_identity(layer, seed)
    return model


def test_the_registry_is_what_the_configuration_allows():
    """Catches: a start that can be configured and not made, or the other way round."""
    assert set(INITS) == set(get_args(InitName))


@pytest.mark.parametrize("method", ["lora", "qdora"])
@pytest.mark.parametrize("init", ["gaussian", "orthogonal"])
def test_a_drawn_start_changes_nothing(tiny_model_folder, init, method):
    """Catches: an update that is not zero at step 0, a norm that an orthogonal start moves."""
    model = model_of(tiny_model_folder, "nf4" if method == "qdora" else "none")
    before = logits(model)
    inject(model, adapter_config(method, r=4, init=init, dtype="float32"))
    assert relative(logits(model), before) < 1e-5


def test_the_starts_have_their_distributions():
    """Catches: a standard deviation of another rank, an orthogonal start whose product is not zero."""
    a_RI, b_OR = INITS["gaussian"].draw(300, 2000, 8, 1)
    assert float(a_RI.std()) == pytest.approx(1 / 8, rel=0.02)
    assert not b_OR.any()
    a_RI, b_OR = INITS["orthogonal"].draw(3000, 2000, 8, 1)
    assert float((b_OR @ a_RI).abs().max()) < 1e-6
    assert float(a_RI.std()) == pytest.approx(0.1 * 0.5**0.5, rel=0.05)
    assert float(b_OR.std()) == pytest.approx(0.1 * 0.5**0.5, rel=0.05)
    other, _ = INITS["gaussian"].draw(300, 2000, 8, 2)
    assert not torch.equal(other, INITS["gaussian"].draw(300, 2000, 8, 1)[0])


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("init", ["kaiming", "gaussian", "orthogonal"])
def test_a_start_goes_both_ways_with_peft(tiny_model_folder, tmp_path, init, method):
    """Catches: a start that is forgotten, or one of PEFT's that is not read."""
    ours = model_of(tiny_model_folder)
    inject(ours, adapter_config(method, r=4, alpha=12.0, init=init, dtype="float32"))
    save_adapter(trained(ours), tmp_path / "ours")
    settings = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert settings["init_lora_weights"] == INITS[init].peft
    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    assert relative(logits(theirs), logits(ours)) < 1e-5
    theirs.save_pretrained(tmp_path / "theirs")
    again = model_of(tiny_model_folder)
    load_adapter(again, tmp_path / "theirs")
    assert {layer.update.init for layer in adapted_layers(again).values()} == {init}
    save_adapter(again, tmp_path / "again")
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_orthogonal_start_is_that_of_peft():
    """Catches: other rows of the orthogonal matrix, or another scale, than PEFT's."""
    linear = torch.nn.ModuleDict({"q": torch.nn.Linear(200, 300, bias=False)})
    config = peft.LoraConfig(r=8, target_modules=["q"], init_lora_weights="orthogonal")
    layer = peft.get_peft_model(linear, config).base_model.model["q"]
    a_RI, b_OR = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    ours_a, ours_b = INITS["orthogonal"].draw(300, 200, 8, 0)
    for theirs, ours in ((a_RI, ours_a), (b_OR, ours_b)):
        assert theirs.shape == ours.shape
        assert float(theirs.std()) == pytest.approx(float(ours.std()), rel=0.1)
        assert torch.linalg.matrix_rank(theirs) == torch.linalg.matrix_rank(ours) == 4


# Step 0 differs from the loaded model by the rounding of the residual in the base's format: for 16 bits
# that of bfloat16, for the others about the error that quantizing the weights once more would make.
@pytest.mark.parametrize(("quantization", "bound"), [("none", 3e-3), ("int8", 1.5e-2), ("nf4", 0.12)])
@pytest.mark.parametrize("dora", [False, True])
def test_pissa_starts_from_the_top_singular_vectors(tiny_model_folder, quantization, bound, dora):
    """Catches: a residual that keeps what the update took over, a rank-R part that is not the best one,
    a magnitude that starts from the residual's norms."""
    model = model_of(tiny_model_folder, quantization)
    before, name = logits(model), "model.layers.1.mlp.up_proj"
    w_OI = model.get_submodule(name).base.dense()
    inject(model, adapter_config("dora" if dora else "lora", r=8, alpha=24.0, init="pissa", dtype="float32"))
    assert relative(logits(model), before) < bound
    layer = adapted_layers(model)[name]
    factors = layer.update.factors()
    u, s, v = torch.linalg.svd(w_OI, full_matrices=False)
    best_OI = (u[:, :8] * s[:8]) @ v[:8]
    assert relative(factors.scale * factors.b_OR @ factors.a_RI, best_OI) < 1e-4
    if dora:
        assert relative(layer.magnitude.value(), w_OI.norm(dim=1)) < bound


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_pissa_adapter_goes_onto_the_base_again(tiny_model_folder, tmp_path, quantization):
    """Catches: trained factors on the base that was loaded, which still has what they took over."""
    model = model_of(tiny_model_folder, quantization)
    inject(model, adapter_config(r=8, alpha=24.0, init="pissa", dtype="float32"))
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.update.b_OR.mul_(1.1)
            layer.magnitude.offset_O.normal_(std=0.1)
    save_adapter(model, tmp_path / "saved")
    again = model_of(tiny_model_folder, quantization)
    load_adapter(again, tmp_path / "saved")
    assert torch.equal(logits(again), logits(model))
    save_adapter(again, tmp_path / "twice")
    files = [(tmp_path / n / "adapter_model.safetensors").read_bytes() for n in ("saved", "twice")]
    assert files[0] == files[1]
    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    with pytest.raises((KeyError, ValueError), match="QDORA"):
        peft.PeftModel.from_pretrained(base, tmp_path / "saved")


def test_a_pissa_adapter_of_peft_is_refused(tiny_model_folder, tmp_path):
    """Catches: factors whose base PEFT derives anew when it loads them, put onto the original base:
    logits that are wrong by 28 to 42%."""
    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa")
    peft.get_peft_model(base, config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="init_lora_weights = 'pissa' is not supported"):
        load_adapter(model_of(tiny_model_folder), tmp_path)


def test_starts_from_full_weights_are_refused_under_fsdp(tiny_model_folder, tmp_path):
    """Catches: singular vectors of one rank's rows."""
    saved = model_of(tiny_model_folder)
    inject(saved, adapter_config(r=4, init="pissa"))
    save_adapter(saved, tmp_path)
    settings = ModelConfig(path=str(tiny_model_folder), quantization="none", dtype="float32")
    context = DistributedContext()
    context.fsdp = FsdpSettings()
    checkpoint = open_checkpoint(settings.path)
    with pytest.raises(InputError, match=r"adapter\.init: the update of model\.layers\.0.*under FSDP"):
        load_model(checkpoint, settings, context, lambda m: inject(m, adapter_config(r=4, init="pissa")))
    with pytest.raises(InputError, match="started from full weights does not go onto a sharded base"):
        load_with_adapter(checkpoint, settings, context, tmp_path)
