"""Going on from a saved adapter: its settings against the configuration's, its values at step 0."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from qdora.adapters.adapt import adapt
from qdora.adapters.inject import adapted_layers
from qdora.adapters.peft_io import load_adapter, save_adapter
from qdora.config import AdapterConfig, ModelConfig
from qdora.distributed.context import DistributedContext
from qdora.errors import InputError
from qdora.models.load import load_base, load_model, put_saved
from qdora.models.sources import open_checkpoint
from tests.axes import METHODS, adapter_config
from tests.axes import adapt as adapt_to

from .oracle import move_off_the_identity, relative

IDS = torch.arange(4, 28).view(2, 12)


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def save(model_folder, folder, method="qdora", **settings):
    """A trained adapter's folder."""
    base = METHODS[method].quantization
    model, _ = load_base(str(model_folder), quantization=base, dtype="float32")
    adapt_to(model, method, **({"r": 4, "alpha": 12.0} | settings))
    for seed, layer in enumerate(adapted_layers(model).values()):
        move_off_the_identity(layer, seed)
    save_adapter(model, folder)
    return folder


def go_on(model_folder, folder, quantization="nf4", **settings):
    """The model as a run has it before its first step, and the settings in force."""
    config = AdapterConfig(from_=str(folder), **settings)
    wanted = ModelConfig(path=str(model_folder), quantization=quantization, dtype="float32")
    context = DistributedContext()
    model, adapted = load_model(
        open_checkpoint(wanted.path), wanted, context, lambda m: adapt(m, config, "adapter", seed=7)
    )
    put_saved(model, adapted.start, context)
    return model, adapted.config


def loaded(model_folder, folder, quantization="nf4"):
    model, _ = load_base(str(model_folder), quantization=quantization, dtype="float32")
    load_adapter(model, folder)
    return model


@pytest.mark.parametrize("method", [name for name, axes in METHODS.items() if not axes.full])
def test_step_0_is_the_loaded_adapter(tiny_model_folder, tmp_path, method):
    """Catches: a fresh start left in place, a magnitude rounded to an offset of 16 bits, A or B rounded."""
    save(tiny_model_folder, tmp_path, method)
    base = METHODS[method].quantization
    model, config = go_on(tiny_model_folder, tmp_path, base)
    assert torch.equal(logits(model), logits(loaded(tiny_model_folder, tmp_path, base)))
    assert (config.type, config.dora) == (METHODS[method].update or "none", METHODS[method].dora)
    assert {p.requires_grad for p in model.parameters()} == {True, False}


@pytest.mark.parametrize("quantization", ["fp4", "int8", "nf3"])
def test_step_0_on_other_formats(tiny_model_folder, tmp_path, quantization):
    """Catches: a norm taken of another format's weight."""
    save(tiny_model_folder, tmp_path)
    model, _ = go_on(tiny_model_folder, tmp_path, quantization)
    assert torch.equal(logits(model), logits(loaded(tiny_model_folder, tmp_path, quantization)))


@pytest.mark.parametrize(("init", "quantization"), [("pissa", "none"), ("olora", "none"), ("olora", "nf4")])
def test_an_adapter_made_of_the_weight(tiny_model_folder, tmp_path, init, quantization):
    """Catches: the residual taken of a residual, or of the trained factors; a continued adapter whose file
    has lost what was subtracted."""
    method = "qdora" if quantization == "nf4" else "dora"
    save(tiny_model_folder, tmp_path / "first", method, init=init)
    expected = logits(loaded(tiny_model_folder, tmp_path / "first", quantization))
    model, config = go_on(tiny_model_folder, tmp_path / "first", quantization, init=init)
    assert config.init == init
    assert torch.equal(logits(model), expected)
    save_adapter(model, tmp_path / "second")
    assert torch.equal(logits(loaded(tiny_model_folder, tmp_path / "second", quantization)), expected)
    with pytest.raises(InputError, match=f"adapter.init is 'kaiming', .* has '{init}'"):
        go_on(tiny_model_folder, tmp_path / "first", quantization, init="kaiming")


def peft_adapter(model_folder, folder, **settings):
    plain = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    theirs = peft.get_peft_model(plain, peft.LoraConfig(**settings))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name or "magnitude" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    theirs.save_pretrained(folder)
    return theirs.eval()


def test_from_peft_and_back(tiny_model_folder, tmp_path):
    """Catches: PEFT's scale or patterns lost on the way through a continued run, a magnitude saved as its
    offset from where the run began."""
    theirs = peft_adapter(
        tiny_model_folder,
        tmp_path / "theirs",
        r=4,
        lora_alpha=9,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"down_proj": 2},
        use_dora=True,
        use_rslora=True,
        lora_dropout=0.25,
    )
    model, config = go_on(tiny_model_folder, tmp_path / "theirs", "none")
    assert relative(logits(model), logits(theirs)) < 1e-5
    assert (config.targets, config.dropout, config.dtype) == (("q_proj", "down_proj"), 0.25, "float32")
    for seed, layer in enumerate(adapted_layers(model).values()):
        move_off_the_identity(layer, 50 + seed)
    save_adapter(model, tmp_path / "ours")
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    again = peft.PeftModel.from_pretrained(plain, tmp_path / "ours").eval()
    assert relative(logits(again), logits(model)) < 1e-5
    assert relative(logits(theirs), logits(model)) > 1e-2


AGREEING = [
    {"r": 4},
    {"r": 4, "alpha": 12.0, "type": "lora", "dora": True, "init": "kaiming"},
    {"targets": ["self_attn.q_proj", "v_proj"]},
    {"alpha": 6.0, "rslora": True},  # 6 / sqrt(4) = 12 / 4
    {"r": 16, "alpha": 48.0, "rank_pattern": {"*": 4}, "alpha_pattern": {"v_proj": 12, "q_proj": 12}},
]


@pytest.mark.parametrize("settings", AGREEING)
def test_a_configuration_that_comes_to_the_same(tiny_model_folder, tmp_path, settings):
    """Catches: settings compared by their words; one that the configuration sets dropped."""
    save(tiny_model_folder, tmp_path, targets=["q_proj", "v_proj"])
    model, config = go_on(tiny_model_folder, tmp_path, dropout=0.5, **settings)
    assert config.dropout == 0.5
    assert all(getattr(config, key) == getattr(AdapterConfig(**settings), key) for key in settings)
    assert torch.equal(logits(model), logits(loaded(tiny_model_folder, tmp_path)))


CONTRADICTIONS = [
    ({"r": 8}, r"adapter.r is 8, .* has 4"),
    ({"alpha": 32.0}, r"adapter.alpha 32 scales .* by 8, .* by 3 there"),
    ({"rslora": True}, r"adapter.alpha 12 with rslora scales"),
    ({"rank_pattern": {"v_proj": 2}}, r"adapter.rank_pattern is \{'v_proj': 2\}, .* has 4 at .*v_proj"),
    ({"dora": False}, "adapter.dora is False, .* has True"),
    ({"type": "vera"}, "adapter.type is 'vera', .* has 'lora'"),
    ({"init": "gaussian"}, "adapter.init is 'gaussian', .* has 'kaiming'"),
    ({"targets": ["q_proj"]}, "adapter.targets leaves out .*v_proj, .* has one there"),
    ({"targets": ["q_proj", "v_proj", "k_proj"]}, "adapter.targets names .*k_proj, .* has none there"),
    ({"magnitude_targets": ["q_proj"]}, "adapter.magnitude_targets leaves out .*v_proj"),
    ({"targets": ["nowhere"]}, "adapter.targets: 'nowhere' matches no linear layer"),
]


@pytest.mark.parametrize(("settings", "message"), CONTRADICTIONS)
def test_a_contradiction_is_refused(tiny_model_folder, tmp_path, settings, message):
    """Catches: a setting of the configuration that is ignored, or followed against what the file holds."""
    save(tiny_model_folder, tmp_path, targets=["q_proj", "v_proj"])
    with pytest.raises(InputError, match=message):
        go_on(tiny_model_folder, tmp_path, **settings)


def test_the_settings_in_force_start_the_same_run(tiny_model_folder, tmp_path):
    """Catches: a resolved configuration that contradicts the adapter that it was resolved from."""
    save(tiny_model_folder, tmp_path, alpha_pattern={"v_proj": 3.0}, magnitude_targets=["q_proj"])
    _, config = go_on(tiny_model_folder, tmp_path)
    model, again = go_on(tiny_model_folder, tmp_path, **config.model_dump(exclude={"from_"}))
    assert again == config
    assert torch.equal(logits(model), logits(loaded(tiny_model_folder, tmp_path)))


def test_magnitudes_alone(tiny_model_folder, tmp_path):
    """Catches: the targets of an adapter without an update compared with layers that it does not have."""
    save(tiny_model_folder, tmp_path, "qmagnitude", targets=["q_proj"])
    _, config = go_on(tiny_model_folder, tmp_path, targets=["q_proj"], type="none")
    assert config.targets == ("q_proj",)
    with pytest.raises(InputError, match=r"adapter.targets names .*k_proj, .* has none there"):
        go_on(tiny_model_folder, tmp_path, targets=["q_proj", "k_proj"])


def test_refused(tiny_model_folder, tmp_path):
    """Catches: a full model taken for an adapter, a start that is silently not the magnitude's."""
    with pytest.raises(InputError, match="no such adapter folder"):
        go_on(tiny_model_folder, tmp_path / "nowhere")
    save(tiny_model_folder, tmp_path / "full", "full")
    with pytest.raises(InputError, match="a fully trained model, not an adapter"):
        go_on(tiny_model_folder, tmp_path / "full", "none")
    with pytest.raises(InputError, match=r"magnitude_start 'original' does not go with adapter.from"):
        AdapterConfig(from_="x", magnitude_start="original")
    assert json.loads(adapter_config(from_="x").model_dump_json())["from"] == "x"
