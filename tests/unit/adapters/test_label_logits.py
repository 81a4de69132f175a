"""Logits at labelled positions alone: the loss and the gradients of transformers, with fewer logits."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BartConfig,
    BartForCausalLM,
    BartForConditionalGeneration,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import qdora
from qdora import logits_at_labels
from qdora.adapters.inject import adapted_layers
from tests import tiny
from tests.tiny import write_tiny_model

from .accelerated import off_the_identity
from .oracle import move_off_the_identity, relative

SIZES = tiny.SIZES | {"head_dim": 16, "vocab_size": 128}
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=128, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    ),
    # Logits that are capped after the output layer, and a further loss beside that of the labels.
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=3.0)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, output_router_logits=True)),
}


def batch(labelled: bool = True) -> dict[str, torch.Tensor]:
    """Three rows of unlike length, of which the second half has labels; one token's label is the first's."""
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(1, 128, (3, 12), generator=generator)
    mask_BT = torch.arange(12) < torch.tensor([[12], [7], [9]])
    labels_BT = ids_BT.masked_fill(~mask_BT | (torch.arange(12) < 5), -100)
    labels_BT[0, 0] = 7  # no token predicts it
    labels_BT[2, 6] = -100
    if not labelled:
        labels_BT.fill_(-100)
    return {"input_ids": ids_BT, "attention_mask": mask_BT.long(), "labels": labels_BT}


def losses_and_gradients(model: torch.nn.Module, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": output.loss.detach(), "logits": output.logits.detach()} | grads


@pytest.mark.parametrize("summed", [False, True], ids=["mean", "sum"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_all_logits(family, summed):
    """Catches: labels that are not shifted, or twice; positions of another row; other logits."""
    torch.manual_seed(0)
    model, inputs = FAMILIES[family]().train(), batch()
    if summed:  # as the Trainer asks for it
        inputs["num_items_in_batch"] = torch.tensor(40)
    theirs = losses_and_gradients(model, **inputs)
    logits_at_labels(model)
    ours = losses_and_gradients(model, **inputs)
    shifted = inputs["labels"][:, 1:] != -100
    assert ours["logits"].shape == (1, int(shifted.sum()), 128) == (1, 12, 128)
    assert relative(ours.pop("logits")[0], theirs.pop("logits")[:, :-1][shifted]) < 1e-5
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert relative(ours[name], tensor) < 1e-5, name
    logits_at_labels(model, on=False)
    assert torch.equal(losses_and_gradients(model, **inputs)["loss"], theirs["loss"])


def test_calls_of_another_kind_are_left():
    """Catches: an evaluation, a generation or a caller's own choice of positions with fewer logits; a
    choice that outlives a pass that failed."""
    torch.manual_seed(0)
    model, inputs = FAMILIES["llama"]().train(), batch()
    plain = copy.deepcopy(model)
    logits_at_labels(model)
    without = {name: tensor for name, tensor in inputs.items() if name != "labels"}
    shifted = torch.nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    for given in (without, inputs | {"shift_labels": shifted}, without | {"logits_to_keep": 3}):
        assert torch.equal(model(**given).logits, plain(**given).logits)
    with pytest.raises(IndexError):
        model(**inputs | {"input_ids": inputs["input_ids"] + 1000})
    assert model(**without).logits.shape == (3, 12, 128)
    assert model.eval()(**inputs).logits.shape == (3, 12, 128)
    copied = copy.deepcopy(model).train()
    assert copied(**inputs).logits.shape == (1, 12, 128)
    logits_at_labels(copied, on=False)
    assert copied(**inputs).logits.shape == (3, 12, 128)
    assert model.train()(**inputs).logits.shape == (1, 12, 128)


def test_a_batch_without_labels_trains_nothing():
    """Catches: an output without a gradient, on which a trainer's backward pass would fail."""
    torch.manual_seed(0)
    model = FAMILIES["llama"]().train()
    logits_at_labels(model)
    given = batch(labelled=False) | {"num_items_in_batch": torch.tensor(40)}
    assert not any(tensor.any() for tensor in losses_and_gradients(model, **given).values())


def test_a_peft_model_with_an_adapted_output_layer():
    """Catches: a choice that `accelerate` does not turn on, or `restore` not off; a wrapped output layer
    that is not asked."""
    torch.manual_seed(0)
    targets = ["q_proj", "down_proj", "lm_head"]
    config = LoraConfig(r=4, lora_alpha=10, use_dora=True, target_modules=targets, task_type="CAUSAL_LM")
    model = off_the_identity(get_peft_model(FAMILIES["llama"](), config)).train()
    inputs = batch()
    theirs = losses_and_gradients(model, **inputs)
    qdora.accelerate(model, logits="labelled")
    ours = losses_and_gradients(model, **inputs)
    assert ours.pop("logits").shape == (1, 12, 128)
    for name, tensor in ours.items():
        assert relative(tensor, theirs[name]) < 1e-5, name
    for undo in (qdora.accelerate, qdora.restore):
        undo(model)
        assert model(**inputs).logits.shape == (3, 12, 128)
        qdora.accelerate(model, logits="labelled")


def test_a_model_of_ours_with_an_adapted_output_layer(tmp_path):
    """Catches: an output layer of ours that is not asked."""
    folder = write_tiny_model(tmp_path / "model", tie_word_embeddings=False)
    model, _ = qdora.load_base(str(folder), dtype="float32", device="cpu")
    config = qdora.AdapterConfig(r=4, alpha=10, targets=["q_proj", "lm_head"], dtype="float32")
    qdora.inject(model, config, seed=3)
    for seed, layer in enumerate(adapted_layers(model).values()):
        move_off_the_identity(layer, seed)
    inputs = {name: tensor.clamp(max=90) for name, tensor in batch().items()}
    theirs = losses_and_gradients(model.train(), **inputs)
    logits_at_labels(model)
    ours = losses_and_gradients(model, **inputs)
    assert ours.pop("logits").shape[:-1] == (1, 12)
    for name, tensor in ours.items():
        assert relative(tensor, theirs[name]) < 1e-5, name


BART = BartConfig(vocab_size=96, d_model=64, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=64)


@pytest.mark.parametrize("make", [lambda: BartForCausalLM(BART), lambda: BartForConditionalGeneration(BART)])
def test_models_with_a_loss_of_their_own_are_refused(make):
    """Catches: labels that are shifted for a model that takes them as they are."""
    with pytest.raises(qdora.InputError, match="logits at labels alone: a Bart"):
        logits_at_labels(make())
