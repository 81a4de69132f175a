"""Any transformers model with linear layers can be adapted: small random ones of several families."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from qdora.adapters.inject import adapted_layers, inject
from qdora.adapters.peft_io import load_adapter, save_adapter
from qdora.errors import InputError
from qdora.models.load import load_base
from tests import tiny
from tests.axes import adapter_config

from .oracle import dense_weight, move_off_the_identity, relative

SIZES = tiny.SIZES | {"intermediate_size": 128, "vocab_size": 96}
IDS = torch.arange(4, 24).view(2, 10)
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def llava() -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        hidden_size=64,  # rows of whole blocks: bitsandbytes' CPU kernel dequantizes others with wrong scales
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=LlamaConfig(**SIZES), image_token_index=95)
    )


def bart() -> BartForConditionalGeneration:
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=96,
            d_model=64,
            encoder_layers=1,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=128,
            decoder_ffn_dim=128,
            dropout=0.0,
        )
    )


FAMILIES = {
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**SIZES)), ALL, 14),
    "mistral": (lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8)), ALL, 14),
    "qwen2": (lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)), ALL, 14),  # q, k and v have biases
    "llava": (llava, tuple(f"model.language_model.*.{name}" for name in ALL), 14),
    "bart": (bart, ("q_proj", "v_proj", "out_proj", "fc1", "fc2"), 21),
}


def make(family: str):
    torch.manual_seed(0)
    build, targets, count = FAMILIES[family]
    return build().train(), targets, count


def outputs(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits


def adapted(family: str, method: str):
    model, targets, _ = make(family)
    report = inject(model, adapter_config(method=method, r=4, targets=targets, dtype="float32"), seed=1)
    for seed, layer in enumerate(adapted_layers(model).values()):
        move_off_the_identity(layer, seed)
    return model, report


@pytest.mark.parametrize("method", ["qdora", "dora", "qdvora", "magnitude"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_train(family, method):
    """Catches: a layer that is missed, a bias that is scaled, an output that somebody overwrites in place."""
    model, report = adapted(family, method)
    assert len(report.magnitude_layers) == FAMILIES[family][2]
    outputs(model).square().sum().backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == len(report.magnitude_layers) * (1 if method == "magnitude" else 3)
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in trained.values())


@pytest.mark.parametrize("method", ["qdora", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_agree_with_peft(family, method, tmp_path):
    """Catches: an adapter that PEFT puts on other layers, or computes otherwise, in any of the families."""
    model, _ = adapted(family, method)
    save_adapter(model, tmp_path)
    plain, _, _ = make(family)
    with torch.no_grad():
        for name, layer in adapted_layers(model).items():
            plain.get_submodule(name).weight.copy_(dense_weight(layer))
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path)
    assert relative(outputs(model), outputs(theirs)) < 1e-5
    again, _, _ = make(family)
    load_adapter(again, tmp_path)
    if method == "lora":
        assert relative(outputs(again), outputs(model)) < 1e-6


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=96, n_positions=64))


def test_gpt2_is_refused_by_name(tmp_path):
    """Catches: 'matches no linear layer' where the user sees the layer in the model."""
    with pytest.raises(InputError, match=r"c_attn is a Conv1D of transformers, which stores its weight as"):
        inject(gpt2(), adapter_config(r=4, targets=("c_attn",)))
    gpt2().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"Conv1D"):
        load_base(str(tmp_path))


def test_experts_are_refused_by_name():
    """Catches: 'matches no linear layer; did you mean q_proj?' for the feed-forward layers of a mixture."""
    model = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4))
    words = (
        r"'up_proj' matches no linear layer of this MixtralForCausalLM; a mixture of experts is not supported"
    )
    for key in ("targets", "magnitude_targets"):
        with pytest.raises(InputError, match=words):
            inject(model, adapter_config(r=4, **{"targets": ("q_proj",), key: ("q_proj", "up_proj")}))
    assert len(inject(model, adapter_config(r=4, targets=("q_proj",))).update_layers) == 2


def test_a_linear_that_two_modules_share_is_refused_by_name():
    """Catches: one of two places that is left without the adapter."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj
    with pytest.raises(
        InputError, match=r"layers\.0\.mlp\.up_proj shares its weight with .*layers\.1\.mlp\.up_proj"
    ):
        inject(model, adapter_config(r=4, targets=("up_proj",)))


def test_tied_weights_of_two_linears_are_refused_by_name():
    """Catches: two adapters on one weight, of which merging would apply both."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(InputError, match=r"shares its weight with model\.layers\.1\.mlp\.up_proj"):
        inject(model, adapter_config(r=4, targets=("up_proj",)))
    untouched = copy.deepcopy(model)
    inject(model, adapter_config(r=4, targets=("down_proj",)))
    assert not adapted_layers(untouched)
