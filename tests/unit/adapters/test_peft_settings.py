"""Every setting of a PEFT adapter is followed, without effect, or refused by name; PEFT is the other side."""

from __future__ import annotations

import dataclasses
import json

import peft
import pytest
import torch
from peft.tuners.tuners_utils import check_target_module_exists
from transformers import AutoModelForCausalLM

from qdora.adapters.inject import adapted_layers
from qdora.adapters.peft_io import load_adapter
from qdora.adapters.peft_settings import NEUTRAL, READ, WITHOUT_EFFECT, refuse_unchosen, refuse_unsupported
from qdora.adapters.saved import read_saved
from qdora.errors import InputError
from qdora.models.load import load_base

from .oracle import relative

IDS = torch.arange(4, 28).view(2, 12)


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def plain(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def written(tiny_model_folder, tmp_path_factory):
    """Adapters that PEFT trained a little, by PEFT's type."""
    folders = {}
    for config in (
        peft.LoraConfig(r=4, lora_alpha=9, target_modules=["q_proj", "up_proj"]),
        peft.VeraConfig(r=4, target_modules=["q_proj", "up_proj"]),
    ):
        torch.manual_seed(0)
        theirs = peft.get_peft_model(plain(tiny_model_folder), config)
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                if "lora_B" in name or "lambda" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        kind = str(config.peft_type.value)
        folders[kind] = tmp_path_factory.mktemp(kind)
        theirs.save_pretrained(folders[kind])
    return folders


def changed(source, folder, settings, *, only=False):
    """The adapter with other settings: on top of PEFT's, or these and the tensors alone."""
    weights = "adapter_model.safetensors"
    (folder / weights).write_bytes((source / weights).read_bytes())
    old = {} if only else json.loads((source / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(old | settings))
    return folder


def loaded(base, folder):
    model, _ = load_base(str(base), quantization="none", dtype="float32")
    load_adapter(model, folder)
    return model


@pytest.mark.parametrize("config", [peft.LoraConfig, peft.VeraConfig])
def test_every_setting_of_the_installed_peft_is_known(config):
    """Catches: a setting of a newer PEFT of which nobody has said what it does to a number."""
    known = READ | WITHOUT_EFFECT | NEUTRAL.keys()
    assert {field.name for field in dataclasses.fields(config)} <= known
    refuse_unsupported(config().to_dict())


COMMON = {"base_model_name_or_path": "x/y", "bias": "none", "fan_in_fan_out": False, "inference_mode": True}
COMMON |= {"lora_alpha": 9, "lora_dropout": 0.05, "modules_to_save": None, "peft_type": "LORA", "r": 4}
COMMON |= {"target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"}
V4 = COMMON | {"auto_mapping": None, "init_lora_weights": True, "layers_pattern": None, "revision": None}
V4 |= {"layers_to_transform": None}
V7 = V4 | {"alpha_pattern": {}, "rank_pattern": {}, "loftq_config": {}, "megatron_config": None}
V7 |= {"megatron_core": "megatron.core", "use_rslora": False}
V10 = V7 | {"use_dora": False, "layer_replication": None}
V14 = V10 | {"eva_config": None, "exclude_modules": None, "lora_bias": False}
V17 = V14 | {"corda_config": None, "trainable_token_indices": None, "target_parameters": None}
V17 |= {"qalora_group_size": 16, "use_qalora": False}
V18 = V17 | {"alora_invocation_tokens": None, "arrow_config": None, "ensure_weight_tying": False}
V18 |= {"peft_version": "0.18.0"}
PUBLISHED = {
    "0.3": COMMON | {"enable_lora": None, "merge_weights": False},
    "0.4": V4,
    "0.7": V7,
    "0.10": V10,
    "0.14": V14,
    "0.17": V17,
    "0.18": V18,
    "unsloth": V14 | {"auto_mapping": {"base_model_class": "LlamaForCausalLM", "unsloth_fixed": True}},
    "a newer one": V18 | {"use_something": False, "something_config": None, "something_pattern": {}},
}


@pytest.mark.parametrize("version", PUBLISHED)
def test_files_of_every_peft_load(tiny_model_folder, written, tmp_path, version):
    """Catches: published adapters refused for a field that changes nothing."""
    folder = changed(written["LORA"], tmp_path, PUBLISHED[version], only=True)
    theirs = peft.PeftModel.from_pretrained(plain(tiny_model_folder), written["LORA"]).eval()
    assert relative(logits(loaded(tiny_model_folder, folder)), logits(theirs)) < 1e-5


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (
            "LORA",
            {"task_type": None, "auto_mapping": {"a": "b"}, "peft_version": "9", "inference_mode": False}
            | {"revision": "main", "ensure_weight_tying": True, "loftq_config": {"loftq_bits": 4}}
            | {"eva_config": {"rho": 1.0}, "corda_config": {"corda_method": "kpm"}, "lora_ga_config": {}}
            | {"megatron_core": "other", "qalora_group_size": 3},
        ),
        ("VERA", {"d_initial": 0.7, "init_weights": False, "inference_mode": False}),
    ],
)
def test_settings_without_effect_have_none_in_peft(tiny_model_folder, written, tmp_path, kind, settings):
    """Catches: a setting passed over that does change what PEFT computes."""
    assert settings.keys() <= WITHOUT_EFFECT
    folder = changed(written[kind], tmp_path, settings)
    theirs = peft.PeftModel.from_pretrained(plain(tiny_model_folder), folder).eval()
    ours = loaded(tiny_model_folder, folder)
    assert relative(logits(ours), logits(theirs)) < 1e-5
    assert relative(logits(ours), logits(loaded(tiny_model_folder, written[kind]))) < 1e-6


@pytest.mark.parametrize(
    "settings",
    [
        *({key: "all" if key == "bias" else {"on": 1}} for key in NEUTRAL),
        {"modules_to_save": ["lm_head"]},
        {"fan_in_fan_out": True},
        {"layer_replication": [[0, 1], [0, 2]]},
        {"target_parameters": ["experts.up"]},
        {"use_something": True},
        {"something_scale": 0.5},
        {"something_scale": 0},
        {"something_config": {"rank": 3}},
        {"something": ["q_proj"]},
    ],
)
@pytest.mark.parametrize("kind", ["LORA", "VERA"])
def test_a_setting_that_is_not_followed_is_refused(written, tmp_path, kind, settings):
    """Catches: a setting that only a list of known evils would find, invented ones included."""
    (key, value), *_ = settings.items()
    changed(written[kind], tmp_path, settings)
    with pytest.raises(InputError, match=f"{key} = .*; allowed: ") as caught:
        read_saved(tmp_path)
    assert repr(value) in str(caught.value)


NAMES = [
    *(f"model.layers.{i}.{part}" for i in range(3) for part in ("self_attn.q_proj", "mlp.up_proj")),
    "model.layers.1.mlp.experts.0.up_proj",
    "lm_head",
    "q_proj",
]
CHOICES = [
    {"target_modules": ["q_proj", "up_proj", "lm_head"]},
    {"target_modules": ["q_proj"]},
    {"target_modules": ["proj"]},
    {"target_modules": ["self_attn.q_proj", "model.layers.2.mlp.up_proj"]},
    {"target_modules": r".*\.(q|up)_proj"},
    {"target_modules": r"model\.layers\.[01]\..*"},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]},
    {"target_modules": ["q_proj", "up_proj", "lm_head"], "layers_to_transform": 1},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": []},
    {"target_modules": ["up_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    {"target_modules": ["up_proj"], "layers_to_transform": [0], "layers_pattern": ["h", "experts"]},
    {"target_modules": ["up_proj"], "layers_to_transform": [1], "layers_pattern": []},
    {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["up_proj"]},
    {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*\.1\..*"},
    {"target_modules": ["q_proj", "up_proj", "lm_head"], "exclude_modules": []},
]


@pytest.mark.parametrize("settings", CHOICES, ids=str)
def test_the_layers_that_peft_leaves_out_are_refused(settings):
    """Catches: tensors that PEFT does not load, because a setting leaves their layer out, applied here."""
    config = peft.LoraConfig(**settings)
    config.target_modules = settings["target_modules"]
    for name in NAMES:
        if check_target_module_exists(config, name):
            refuse_unchosen(settings, [name])
        else:
            with pytest.raises(ValueError, match=rf"leaves out {name}"):
                refuse_unchosen(settings, [name])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"layers_to_transform": [0]}, r"layers_to_transform = \[0\] leaves out model\.layers\.1"),
        ({"target_modules": ["q_proj"]}, r"leaves out model\.layers\.0\.mlp\.up_proj"),
        ({"exclude_modules": ["up_proj"]}, r"exclude_modules = \['up_proj'\] leaves out"),
        ({"target_modules": "(q"}, "is no regular expression"),
        ({"layers_to_transform": [0], "layers_pattern": "(l"}, "is no regular expression"),
        ({"layers_to_transform": "0"}, "layers_to_transform|in <string>"),
    ],
)
def test_a_file_with_tensors_that_its_settings_leave_out(
    tiny_model_folder, written, tmp_path, settings, words
):
    """Catches: more layers adapted than PEFT adapts, or a traceback for settings that cannot be used."""
    changed(written["LORA"], tmp_path, settings)
    model, _ = load_base(str(tiny_model_folder), quantization="none", dtype="float32")
    with pytest.raises(InputError, match=words):
        load_adapter(model, tmp_path)
    assert not adapted_layers(model)
