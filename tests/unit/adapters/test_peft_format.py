"""Adapters on disk, with PEFT as the other side."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qdora.adapters.inject import adapted_layers, inject, linear_layers
from qdora.adapters.layer import AdaptedLinear
from qdora.adapters.peft_io import load_adapter, save_adapter
from qdora.errors import CheckpointError, InputError
from qdora.models.load import load_base
from tests.axes import METHODS, adapt, adapter_config
from tests.tiny import write_tiny_model

from .oracle import move_off_the_identity, relative

IDS = torch.arange(4, 28).view(2, 12)


def fresh(folder, method):
    model, _ = load_base(str(folder), quantization=METHODS[method].quantization, dtype="float32")
    return model


def adapted(folder, method="qdora", **changes):
    model = fresh(folder, method)
    inject(model, adapter_config(**({"method": method, "r": 4, "alpha": 12.0} | changes)))
    for seed, layer in enumerate(adapted_layers(model).values()):
        move_off_the_identity(layer, seed)
    return model


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def peft_base(folder, model):
    """A plain transformers model holding the weights that ours sees, in float32."""
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, layer in linear_layers(model).items():
        weight = layer.base.dense(torch.float32) if isinstance(layer, AdaptedLinear) else layer.weight
        with torch.no_grad():
            plain.get_submodule(name).weight.copy_(weight)
    return plain


@pytest.mark.parametrize("method", ["lora", "dora", "qlora", "qdora"])
def test_peft_reproduces_our_logits(tiny_model_folder, tmp_path, method):
    """Catches: a magnitude saved as its offset, a scale that PEFT reads differently, a misnamed tensor."""
    model = adapted(tiny_model_folder, method)
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(peft_base(tiny_model_folder, model), tmp_path).eval()
    assert relative(logits(theirs), logits(model)) < 1e-5
    assert relative(logits(peft_base(tiny_model_folder, model)), logits(model)) > 1e-2


@pytest.mark.parametrize("dora", [True, False])
@pytest.mark.parametrize("rslora", [True, False])
def test_an_adapter_from_peft_loads_here(tiny_model_folder, tmp_path, dora, rslora):
    """Catches: PEFT's settings read wrongly, a magnitude rounded to bf16 on the way in."""
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    settings = peft.LoraConfig(
        r=4, lora_alpha=9, target_modules=["q_proj", "down_proj"], use_dora=dora, use_rslora=rslora
    )
    theirs = peft.get_peft_model(plain, settings)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name or "magnitude" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(tmp_path)
    model, _ = load_base(str(tiny_model_folder), quantization="none", dtype="float32")
    report = load_adapter(model, tmp_path)
    assert len(report.update_layers) == 4
    assert len(report.magnitude_layers) == (4 if dora else 0)
    assert relative(logits(model), logits(theirs.eval())) < 1e-5


def test_save_load_round_trip(tiny_model_folder, tmp_path):
    """Catches: an adapter that is not the same after it was saved and loaded."""
    model = adapted(tiny_model_folder)
    save_adapter(model, tmp_path)
    again, _ = load_base(str(tiny_model_folder), dtype="float32")
    load_adapter(again, tmp_path)
    assert relative(logits(again), logits(model)) < 1e-6


def test_adapter_for_another_base_is_refused(tiny_model_folder, tmp_path):
    """Catches: an adapter put on other weights of the same shape, where it means nothing."""
    save_adapter(adapted(tiny_model_folder), tmp_path / "adapter")
    other, _ = load_base(str(write_tiny_model(tmp_path / "other", seed=9)))
    with pytest.raises(InputError, match="made for another base: its fingerprint"):
        load_adapter(other, tmp_path / "adapter")


def strip_metadata(folder):
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path), path, {"format": "pt"})


@pytest.mark.parametrize("changes", [{"intermediate_size": 128}, {"num_hidden_layers": 1}])
def test_adapter_of_other_shapes_is_refused(tiny_model_folder, tmp_path, changes):
    """Catches: shapes that only fail inside copy_, or layers that are left out in silence."""
    save_adapter(adapted(tiny_model_folder), tmp_path / "adapter")
    strip_metadata(tmp_path / "adapter")
    other, _ = load_base(str(write_tiny_model(tmp_path / "other", **changes)))
    with pytest.raises(InputError, match="made for another base"):
        load_adapter(other, tmp_path / "adapter")
    assert not adapted_layers(other)


def test_rank_that_disagrees_with_the_config_is_refused(tiny_model_folder, tmp_path):
    """Catches: a rank-1 tensor broadcast into a rank-4 parameter."""
    save_adapter(adapted(tiny_model_folder, r=1), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 4}))
    model, _ = load_base(str(tiny_model_folder), dtype="float32")
    with pytest.raises(InputError, match="another base or rank"):
        load_adapter(model, tmp_path)


def test_truncated_weights_are_named(tiny_model_folder, tmp_path):
    """Catches: a traceback from safetensors instead of the file's name."""
    save_adapter(adapted(tiny_model_folder), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    model, _ = load_base(str(tiny_model_folder), dtype="float32")
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors: truncated or corrupt"):
        load_adapter(model, tmp_path)


def test_missing_pieces_are_named(tiny_model_folder, tmp_path):
    """Catches: a half adapter loaded with zeros where its B should be."""
    model, _ = load_base(str(tiny_model_folder), dtype="float32")
    with pytest.raises(InputError, match="no such adapter folder"):
        load_adapter(model, tmp_path / "nowhere")
    save_adapter(adapted(tiny_model_folder), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"q_proj lacks lora_B\.weight"):
        load_adapter(model, tmp_path)
    path.unlink()
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(InputError, match="no pickle is ever loaded"):
        load_adapter(model, tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"rank_pattern": {"q_proj": 2}}, "q_proj.lora_A.weight has shape"),
        ({"alpha_pattern": {"q_(proj": 2}}, "is no regular expression"),
        ({"alpha_pattern": [{}]}, r"alpha_pattern = \[\{\}\]; expected numbers by pattern"),
        ({"rank_pattern": {"q_proj": "2"}}, "rank_pattern.q_proj = '2'; expected a finite number"),
        ({"r": 4.5}, "r: Input should be a valid integer, got 4.5"),
        ({"lora_alpha": 10**400}, "lora_alpha = 10+; expected a finite number"),
        ({"lora_alpha": float("nan")}, "lora_alpha = nan"),
        ({"use_rslora": "false"}, "rslora: Input should be a valid boolean, got 'false'"),
        ({"lora_dropout": None}, "lora_dropout = None"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_settings_that_change_the_result_are_refused(tiny_model_folder, tmp_path, change, words):
    """Catches: a PEFT setting that is ignored, so that the adapter computes something else here."""
    save_adapter(adapted(tiny_model_folder), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    model, _ = load_base(str(tiny_model_folder), dtype="float32")
    with pytest.raises(InputError, match=words):
        load_adapter(model, tmp_path)


@pytest.mark.parametrize("rslora", [True, False])
@pytest.mark.parametrize("method", ["lora", "qdora"])
def test_patterns_reach_peft(tiny_model_folder, tmp_path, method, rslora):
    """Catches: a rank or an alpha of one layer that PEFT takes for another's."""
    patterns = {
        "rank_pattern": {"q_proj": 2, "model.layers.1.mlp.down_proj": 6},
        "alpha_pattern": {"*.0.*": 3.0, "v_proj": 20.0},
    }
    model = adapted(tiny_model_folder, method, rslora=rslora, **patterns)
    layers = adapted_layers(model)
    assert layers["model.layers.0.self_attn.q_proj"].update.r == 2
    assert layers["model.layers.1.mlp.down_proj"].update.r == 6
    scale = layers["model.layers.0.self_attn.v_proj"].update.scale  # the first pattern counts
    assert scale == pytest.approx(3.0 / (2.0 if rslora else 4.0))
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(peft_base(tiny_model_folder, model), tmp_path).eval()
    assert relative(logits(theirs), logits(model)) < 1e-5
    again, _ = load_base(
        str(tiny_model_folder), quantization="nf4" if method == "qdora" else "none", dtype="float32"
    )
    load_adapter(again, tmp_path)
    assert relative(logits(again), logits(model)) < 1e-6


@pytest.mark.parametrize("rslora", [True, False])
@pytest.mark.parametrize("dora", [True, False])
def test_patterns_come_from_peft(tiny_model_folder, tmp_path, rslora, dora):
    """Catches: PEFT's regular expressions read as our patterns, rsLoRA's root of another rank."""
    theirs = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32),
        peft.LoraConfig(
            r=4,
            lora_alpha=9,
            target_modules="all-linear",
            rank_pattern={"q_proj": 2, r"layers\.1\..*down_proj": 6},
            alpha_pattern={r"layers\.0\..*": 3},
            use_rslora=rslora,
            use_dora=dora,
        ),
    )
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name or "magnitude" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(tmp_path)
    model, _ = load_base(str(tiny_model_folder), quantization="none", dtype="float32")
    load_adapter(model, tmp_path)
    assert relative(logits(model), logits(theirs.eval())) < 1e-5


@pytest.mark.parametrize("method", ["vera", "qvera"])
def test_vera_reaches_peft(tiny_model_folder, tmp_path, method):
    """Catches: matrices that PEFT does not draw from the same seed, vectors named the wrong way round."""
    model = adapted(tiny_model_folder, method, targets=("q_proj", "down_proj"))
    save_adapter(model, tmp_path)
    assert not any("vera_A" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    theirs = peft.PeftModel.from_pretrained(peft_base(tiny_model_folder, model), tmp_path).eval()
    assert relative(logits(theirs), logits(model)) < 1e-5
    assert relative(logits(peft_base(tiny_model_folder, model)), logits(model)) > 1e-3


@pytest.mark.parametrize("projection", ["seed", "saved", "foreign"])
def test_vera_comes_from_peft(tiny_model_folder, tmp_path, projection):
    """Catches: PEFT's saved matrices ignored where they are not those of its seed."""
    config = peft.VeraConfig(
        r=8,
        target_modules=["q_proj", "up_proj"],
        projection_prng_key=5,
        save_projection=projection != "seed",
        d_initial=0.3,
    )
    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    theirs = peft.get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "vera_lambda" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        if projection == "foreign":
            theirs.base_model.vera_A["default"].mul_(0.5)
    theirs.save_pretrained(tmp_path / "theirs")
    model, _ = load_base(str(tiny_model_folder), quantization="none", dtype="float32")
    load_adapter(model, tmp_path / "theirs")
    assert relative(logits(model), logits(theirs.eval())) < 1e-5
    save_adapter(model, tmp_path / "ours")
    tensors = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert any("vera_A" in key for key in tensors) == (projection == "foreign")
    again, _ = load_base(str(tiny_model_folder), quantization="none", dtype="float32")
    load_adapter(again, tmp_path / "ours")
    assert relative(logits(again), logits(model)) < 1e-6


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("dvora", {}),
        ("qdvora", {}),
        ("magnitude", {}),
        ("qmagnitude", {}),
        ("qdora", {"targets": ("q_proj", "v_proj"), "magnitude_targets": ("v_proj", "up_proj")}),
    ],
)
def test_methods_that_peft_lacks_are_marked(tiny_model_folder, tmp_path, method, changes):
    """Catches: a file from which PEFT would compute something else, or one that does not load here."""
    model = adapted(tiny_model_folder, method, **changes)
    save_adapter(model, tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["adapter_type"] == (METHODS[method].update or "none")
    assert settings["dora"]
    with pytest.raises((KeyError, ValueError), match="QDORA"):
        peft.PeftModel.from_pretrained(peft_base(tiny_model_folder, model), tmp_path)
    again = fresh(tiny_model_folder, method)
    load_adapter(again, tmp_path)
    assert relative(logits(again), logits(model)) < 1e-6


@pytest.mark.parametrize("method", ["qdvora", "dvora", "qmagnitude", "full"])
def test_a_file_of_a_former_version_loads(tiny_model_folder, tmp_path, method):
    """Catches: adapters that were saved before `adapter_type` had its name, lost or taken for others."""
    model = fresh(tiny_model_folder, method)
    adapt(model, method, r=4)
    save_adapter(model, tmp_path)
    path = tmp_path / "adapter_config.json"
    settings = json.loads(path.read_text())
    del settings["adapter_type"]
    settings.pop("dora", None)
    path.write_text(json.dumps(settings | {"qdora_method": method}))
    again = fresh(tiny_model_folder, method)
    load_adapter(again, tmp_path)
    assert relative(logits(again), logits(model)) < 1e-6


def test_an_unknown_method_of_ours_is_refused(tiny_model_folder, tmp_path):
    """Catches: a file of a later version read as something that it is not."""
    save_adapter(adapted(tiny_model_folder, "qdvora"), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"adapter_type": "veera"}))
    model, _ = load_base(str(tiny_model_folder), dtype="float32")
    with pytest.raises(InputError, match=r"unknown adapter_type 'veera'; did you mean 'vera'"):
        load_adapter(model, tmp_path)


def test_a_model_without_an_adapter_is_not_saved(tiny_model_folder, tmp_path):
    """Catches: a plain model, trainable throughout, written as if it were fine-tuned."""
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    with pytest.raises(InputError, match="no adapter to save"):
        save_adapter(plain, tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
