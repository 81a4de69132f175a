"""The paper's other backbones, as tiny random models: LLaVA, BART, T5 and a UNet shaped like SDXL's."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BitsAndBytesConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from qdora.adapters.inject import adapted_layers, inject, merge_adapters, merge_and_unload, unmerge_adapters
from qdora.adapters.peft_io import load_adapter, save_adapter
from tests.axes import adapter_config

from .oracle import move_off_the_identity, relative
from .test_model_families import IDS, bart, llava

ROOT = Path(__file__).parents[3]
PEFT_NAMES = {
    "update.a_RI": "lora_A.default.weight",
    "update.b_OR": "lora_B.default.weight",
    "magnitude.offset_O": "lora_magnitude_vector.default.weight",
}


def t5() -> T5ForConditionalGeneration:
    """As T5 1.1: a gated feed-forward layer, and an output layer of its own."""
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=96,
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            decoder_start_token_id=0,
        )
    )


def unet() -> UNet2DConditionModel:
    """Two resolutions, transformers of different depth, and SDXL's embedding of text and sizes."""
    return UNet2DConditionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        cross_attention_dim=24,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=60,
        norm_num_groups=8,
    )


def llava_logits(model: nn.Module) -> torch.Tensor:
    ids = IDS.clone()
    ids[:, 1:5] = 95  # a picture of 16 is four patches of 8
    pixels = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16).sin()
    return model(input_ids=ids, pixel_values=pixels).logits


def seq2seq_logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS, labels=IDS.flip(1)).logits


def unet_noise(model: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents, text, pooled = (
        torch.randn(*size, generator=generator) for size in ((2, 4, 8, 8), (2, 5, 24), (2, 12))
    )
    sizes = {"text_embeds": pooled, "time_ids": torch.arange(12.0).view(2, 6)}
    return model(latents, torch.tensor([3, 500]), text, added_cond_kwargs=sizes).sample


@dataclass(frozen=True)
class Backbone:
    """A tiny model, the layers that are adapted, how many those are, and what it computes."""

    build: Callable[[], nn.Module]
    targets: tuple[str, ...]
    count: int
    output: Callable[[nn.Module], torch.Tensor]
    task: str | None


ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
BACKBONES = {
    "llava": Backbone(
        llava,
        # The last layer of the vision tower is not read: `vision_feature_layer` is -2.
        (
            "*.language_model.*_proj",
            "*.vision_tower.*.layers.0.*_proj",
            "*.multi_modal_projector.*",
            "patch_embedding",
        ),
        14 + 4 + 2 + 1,
        llava_logits,
        "CAUSAL_LM",
    ),
    "bart": Backbone(bart, ("q_proj", "v_proj"), 2 * (1 + 2 * 2), seq2seq_logits, "SEQ_2_SEQ_LM"),
    "t5": Backbone(t5, ("q", "v", "wo"), 2 * 2 * 3 + 4, seq2seq_logits, "SEQ_2_SEQ_LM"),
    "unet": Backbone(
        unet, (*ATTENTION, "conv1", "conv_shortcut", "*samplers.*.conv"), 64 + 15, unet_noise, None
    ),
}


@cache
def _made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return BACKBONES[name].build().train()


def make(name: str) -> nn.Module:
    return copy.deepcopy(_made(name))


def adapted(name: str, model: nn.Module | None = None) -> nn.Module:
    """With an adapter that is off the identity: rank 4, alpha 32."""
    model = make(name) if model is None else model
    config = adapter_config("dora", r=4, alpha=32, targets=BACKBONES[name].targets, dtype="float32")
    report = inject(model, config, seed=1)
    assert len(report.update_layers) == BACKBONES[name].count
    for seed, layer in enumerate(adapted_layers(model).values()):
        move_off_the_identity(layer, seed)
    return model


def assert_same_gradients(ours: nn.Module, theirs: nn.Module, bound: float) -> None:
    """Of every parameter that is trained, after a backward pass of both."""
    names = {
        f"base_model.model.{layer}.{PEFT_NAMES[own]}": parameter
        for layer, module in adapted_layers(ours).items()
        for own, parameter in module.named_parameters()
        if own in PEFT_NAMES
    }
    trained = {name: parameter for name, parameter in theirs.named_parameters() if parameter.requires_grad}
    assert names.keys() == trained.keys()
    for name, parameter in names.items():
        expected = trained[name].grad
        assert expected.norm() > 0, name
        assert relative(parameter.grad, expected.reshape(parameter.grad.shape)) < bound, name


@pytest.mark.parametrize("name", BACKBONES)
def test_outputs_and_gradients_are_those_of_peft(name, tmp_path):
    """Catches: an adapter on another layer than PEFT's, a wrapper that PEFT cannot put around the model, a
    convolution's tensor in another shape, a norm over other weights, a model that asks for a layer's weight.
    """
    backbone, ours = BACKBONES[name], adapted(name)
    save_adapter(ours, tmp_path / "ours")
    assert json.loads((tmp_path / "ours/adapter_config.json").read_text())["task_type"] == backbone.task
    theirs = peft.PeftModel.from_pretrained(make(name), tmp_path / "ours", is_trainable=True).train()
    outputs = [backbone.output(model) for model in (ours, theirs)]
    assert relative(*outputs) < 1e-5
    for output in outputs:
        output.square().mean().backward()
    assert_same_gradients(ours, theirs, 1e-4)

    theirs.save_pretrained(tmp_path / "theirs")
    files = [load_file(tmp_path / origin / "adapter_model.safetensors") for origin in ("ours", "theirs")]
    assert {k: t.shape for k, t in files[0].items()} == {k: t.shape for k, t in files[1].items()}
    again = make(name)
    load_adapter(again, tmp_path / "theirs")
    assert relative(backbone.output(again), outputs[0]) < 1e-6


@pytest.mark.parametrize("name", BACKBONES)
def test_a_plain_loop_trains_saves_merges_and_reloads(name, tmp_path):
    """Catches: a parameter that no gradient reaches, a merged layer of another shape or without its bias, a
    model that its library cannot save and load afterwards."""
    backbone, model = BACKBONES[name], make(name)
    inject(model, adapter_config("dora", r=4, alpha=8, targets=backbone.targets, dtype="float32"))
    target = backbone.output(model).detach().roll(1, 0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = (backbone.output(model) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.99 * losses[0], losses
    model.eval()
    with torch.no_grad():
        trained = backbone.output(model)
        save_adapter(model, tmp_path / "adapter")
        merge_adapters(model)
        merged = backbone.output(model)
        unmerge_adapters(model)
        assert torch.equal(backbone.output(model), trained)
        reloaded = make(name).eval()
        load_adapter(reloaded, tmp_path / "adapter")
        assert merge_and_unload(model) is model
        assert {k: t.shape for k, t in model.state_dict().items()} == {
            k: t.shape for k, t in make(name).state_dict().items()
        }
        model.save_pretrained(tmp_path / "merged")
        plain = type(model).from_pretrained(tmp_path / "merged").eval()
        for other in (merged, backbone.output(reloaded), backbone.output(plain)):
            assert relative(other, trained) < 1e-5


@pytest.mark.parametrize("name", ["llava", "t5"])
def test_four_bits_of_bitsandbytes_are_those_of_peft(name, tmp_path):
    """Catches: bytes that are read otherwise in a vision tower or an encoder, T5's `wo`, which stays float32
    beside them, taken for a quantized one, a rounding of it to the dtype of the rest."""
    make(name).save_pretrained(tmp_path / "base")
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )

    def load() -> nn.Module:
        kind = type(make(name))
        return kind.from_pretrained(
            tmp_path / "base", quantization_config=settings, dtype=torch.float32
        ).train()

    backbone, ours = BACKBONES[name], adapted(name, load())
    formats = {layer.base.quantization for layer in adapted_layers(ours).values()}
    assert formats == {"nf4", "none"}
    save_adapter(ours, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(load(), tmp_path / "adapter", is_trainable=True).train()
    outputs = [backbone.output(model) for model in (ours, theirs)]
    assert relative(*outputs) < 1e-5
    for output in outputs:
        output.square().mean().backward()
    assert_same_gradients(ours, theirs, 1e-4)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_output_projection_of_t5_keeps_its_float32(quantization, tmp_path):
    """Catches: T5 in float16 whose `wo`, kept in float32 because it overflows otherwise, gets 16-bit inputs
    once it has an adapter, quantized or not."""
    make("t5").save_pretrained(tmp_path)
    model = T5ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float16)
    inject(model, adapter_config("dora", r=4, targets=("wo", "wi_0")), quantization=quantization)
    seen = {}

    def note(name: str, layer: nn.Module) -> None:
        layer.register_forward_hook(lambda _, given, y: seen.update({name: (given[0].dtype, y.dtype)}))

    for name, layer in adapted_layers(model).items():
        note(name, layer)
    seq2seq_logits(model)
    expected = {
        name: torch.float32 if name.endswith("wo") else torch.float16 for name in adapted_layers(model)
    }
    assert seen == {name: (dtype, dtype) for name, dtype in expected.items()}


def test_the_recipes_of_the_page_run(tmp_path, monkeypatch):
    """Catches: a recipe in docs/paper.md that no longer runs, whose adapter another tool reads otherwise, or
    whose merged model is another one."""
    blocks = re.findall(r"(?ms)^```python$(.*?)^```$", (ROOT / "docs/paper.md").read_text(encoding="utf-8"))
    assert len(blocks) == 5
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    for folder in ("llava-adapter", "bart-adapter", "t5-adapter", "unet-adapter"):
        assert (tmp_path / folder / "adapter_model.safetensors").is_file()
    latents, text, added = (names["batch"][key] for key in ("latents", "text", "added"))
    models = names["unet"], names["theirs"], UNet2DConditionModel.from_pretrained("unet-merged")
    outputs = [model.eval()(latents, 7, text, added_cond_kwargs=added).sample for model in models]
    base = UNet2DConditionModel.from_pretrained("unet").eval()
    assert relative(base(latents, 7, text, added_cond_kwargs=added).sample, outputs[0]) > 1e-2
    for output in outputs[1:]:
        assert relative(output, outputs[0]) < 1e-5
