"""How A and B start: their values, that the model is the same at step 0, and what PEFT makes of it."""

from __future__ import annotations

import json
from typing import get_args

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

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
from tests.tiny import write_tiny_model

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
@pytest.mark.parametrize("init", ["gaussian", "gaussian_sqrt", "orthogonal"])
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
    a_RI, b_OR = INITS["gaussian_sqrt"].draw(300, 2000, 8, 1)
    assert float(a_RI.var()) == pytest.approx(1 / 8, rel=0.02)
    assert not b_OR.any()
    a_RI, b_OR = INITS["orthogonal"].draw(3000, 2000, 8, 1)
    assert float((b_OR @ a_RI).abs().max()) < 1e-6
    assert float(a_RI.std()) == pytest.approx(0.1 * 0.5**0.5, rel=0.05)
    assert float(b_OR.std()) == pytest.approx(0.1 * 0.5**0.5, rel=0.05)
    other, _ = INITS["gaussian"].draw(300, 2000, 8, 2)
    assert not torch.equal(other, INITS["gaussian"].draw(300, 2000, 8, 1)[0])


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("init", ["kaiming", "gaussian", "gaussian_sqrt", "orthogonal"])
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


@pytest.mark.parametrize("dora", [False, True])
def test_olora_starts_from_the_qr_decomposition(tiny_model_folder, dora):
    """Catches: rows of Q for columns, a scale in the factors, a residual that keeps what they took over."""
    model = model_of(tiny_model_folder)
    before, name = logits(model), "model.layers.1.mlp.up_proj"
    w_OI = model.get_submodule(name).base.dense()
    inject(model, adapter_config("dora" if dora else "lora", r=8, alpha=24.0, init="olora", dtype="float32"))
    assert relative(logits(model), before) < 3e-3
    update = adapted_layers(model)[name].update
    q, r = torch.linalg.qr(w_OI)
    assert relative(update.b_OR, q[:, :8]) < 1e-5
    assert relative(update.a_RI, r[:8]) < 1e-5


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_an_adapter_made_of_the_weight_goes_onto_the_base_again(
    tiny_model_folder, tmp_path, quantization, init
):
    """Catches: trained factors on the base that was loaded, which still has what they took over."""
    model = model_of(tiny_model_folder, quantization)
    inject(model, adapter_config(r=8, alpha=24.0, init=init, dtype="float32"))
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.update.b_OR.mul_(1.1)
            layer.magnitude.offset_O.normal_(std=0.1)
    save_adapter(model, tmp_path / "saved")
    again = model_of(tiny_model_folder, quantization)
    load_adapter(again, tmp_path / "saved")
    assert torch.equal(logits(again), logits(model))
    save_adapter(again, tmp_path / "twice")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "saved" / file).read_bytes() == (tmp_path / "twice" / file).read_bytes()
    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    with pytest.raises((KeyError, ValueError), match="QDORA"):
        peft.PeftModel.from_pretrained(base, tmp_path / "saved")


def peft_adapter(base, folder, init, *, dora=False, **settings):
    """An adapter that PEFT trained a little, saved without conversion."""
    config = peft.LoraConfig(
        r=4,
        lora_alpha=9,
        target_modules=["q_proj", "down_proj"],
        init_lora_weights=init,
        use_dora=dora,
        **settings,
    )
    torch.manual_seed(3)
    theirs = peft.get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name or "magnitude" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(folder)


def peft_base_model(folder, dtype):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


# PEFT keeps the residual in the dtype of the weights, and so do we: the model is stored as PEFT loads it.
@pytest.mark.parametrize(
    ("init", "dtype", "rslora", "dora"),
    [
        ("pissa", torch.float32, True, True),
        ("pissa", torch.bfloat16, False, False),
        ("pissa", torch.bfloat16, False, True),
        ("olora", torch.float32, False, True),
        ("OLoRA", torch.bfloat16, True, False),
        ("eva", torch.float32, False, False),
        (False, torch.float32, False, False),
    ],
)
def test_peft_derives_the_base_anew_and_so_do_we(tmp_path, init, dtype, rslora, dora):
    """Catches: factors whose base PEFT derives anew when it loads them, put onto the original base:
    logits that are wrong by 28 to 42%."""
    folder = write_tiny_model(tmp_path / "model", dtype=dtype)
    peft_adapter(peft_base_model(folder, dtype), tmp_path / "theirs", init, use_rslora=rslora, dora=dora)
    theirs = (
        peft.PeftModel.from_pretrained(peft_base_model(folder, dtype), tmp_path / "theirs").float().eval()
    )
    ours = model_of(folder)
    load_adapter(ours, tmp_path / "theirs")
    assert relative(logits(ours), logits(theirs)) < 1e-5
    save_adapter(ours, tmp_path / "ours")
    again = model_of(folder)
    load_adapter(again, tmp_path / "ours")
    assert relative(logits(again), logits(ours)) < 1e-6
    save_adapter(again, tmp_path / "twice")
    files = [tmp_path / name / "adapter_config.json" for name in ("ours", "twice")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(("init", "quantization"), [("pissa", "none"), ("olora", "nf4")])
def test_commands_load_a_start_of_peft_as_python_does(tmp_path, init, quantization):
    """Catches: a base that is derived before its weights are there, or twice."""
    folder = write_tiny_model(tmp_path / "model", dtype=torch.float32)
    peft_adapter(peft_base_model(folder, torch.float32), tmp_path / "theirs", init)
    settings = ModelConfig(path=str(folder), quantization=quantization, dtype="float32")
    checkpoint = open_checkpoint(settings.path)
    loaded = load_with_adapter(checkpoint, settings, DistributedContext(), tmp_path / "theirs")
    ours = model_of(folder, quantization)
    load_adapter(ours, tmp_path / "theirs")
    assert relative(logits(loaded), logits(ours)) < 1e-6


def four_bit_model(folder):
    """The model with bitsandbytes' layers, as transformers makes them."""
    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    )


def test_olora_of_peft_on_nf4(tmp_path):
    """Catches: a residual of other weights than the dequantized ones, or one that is not quantized again."""
    # Rows of whole blocks: bitsandbytes takes wrong scales of others on CPUs with AVX512.
    folder = write_tiny_model(tmp_path / "model", dtype=torch.float32, intermediate_size=128)
    peft_adapter(four_bit_model(folder), tmp_path / "theirs", "olora")
    # In evaluation bitsandbytes repacks its weights on some CPUs and rounds their scales.
    theirs = peft.PeftModel.from_pretrained(four_bit_model(folder), tmp_path / "theirs").train()
    ours = four_bit_model(folder).train()
    load_adapter(ours, tmp_path / "theirs")
    assert relative(logits(ours), logits(theirs)) < 1e-5


@pytest.mark.parametrize("route", ["load_base", "bitsandbytes"])
def test_pissa_of_peft_on_nf4_is_refused(tmp_path, route):
    """Catches: singular vectors of a quantized weight, which PEFT refuses: not the adapter's base."""
    folder = write_tiny_model(tmp_path / "model")
    peft_adapter(peft_base_model(folder, torch.float32), tmp_path / "theirs", "pissa")
    with pytest.raises(TypeError, match="initialize PiSSA under float32"):
        peft.PeftModel.from_pretrained(four_bit_model(folder), tmp_path / "theirs")
    model = model_of(folder, "nf4") if route == "load_base" else four_bit_model(folder)
    with pytest.raises(InputError, match=r"'pissa' is made of an unquantized weight.* load the model with"):
        load_adapter(model, tmp_path / "theirs")
    assert not adapted_layers(model)


@pytest.mark.parametrize(
    ("init", "words"),
    [
        ("pissa_niter_4", "at random, anew at every load; convert the adapter in PEFT"),
        ("corda", "path_initial_model_for_weight_conversion"),
        ("lora_ga", "path_initial_model_for_weight_conversion"),
        ("loftq", "save that base"),
        ("mica", "B would have to stay"),
        ("pizza", "an unknown start"),
        (1, "an unknown start"),
        (None, "an unknown start"),
    ],
)
def test_a_start_whose_base_cannot_be_had_is_refused(tiny_model_folder, tmp_path, init, words):
    """Catches: a start of PEFT's that changes the base in a way that the file does not tell, ignored."""
    peft_adapter(peft_base_model(tiny_model_folder, torch.float32), tmp_path, True)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": init}))
    with pytest.raises(
        InputError, match=rf"init_lora_weights = {init!r} is not supported: .*{words}.*; allowed: True"
    ):
        load_adapter(model_of(tiny_model_folder), tmp_path)


def test_starts_from_full_weights_are_refused_under_fsdp(tiny_model_folder, tmp_path):
    """Catches: singular vectors of one rank's rows."""
    saved = model_of(tiny_model_folder)
    inject(saved, adapter_config(r=4, init="pissa"))
    save_adapter(saved, tmp_path / "ours")
    peft_adapter(peft_base_model(tiny_model_folder, torch.float32), tmp_path / "theirs", "olora")
    settings = ModelConfig(path=str(tiny_model_folder), quantization="none", dtype="float32")
    context = DistributedContext()
    context.fsdp = FsdpSettings()
    checkpoint = open_checkpoint(settings.path)
    with pytest.raises(InputError, match=r"adapter\.init: the update of model\.layers\.0.*under FSDP"):
        load_model(checkpoint, settings, context, lambda m: inject(m, adapter_config(r=4, init="pissa")))
    for name in ("ours", "theirs"):
        with pytest.raises(InputError, match="started from full weights does not go onto a sharded base"):
            load_with_adapter(checkpoint, settings, context, tmp_path / name)
