"""Joined sequences: what they compute is what they compute apart, for every family that is allowed."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import varlen
from transformers import AutoConfig, AutoModelForCausalLM

from qdora.adapters.inject import adapted_layers, inject
from qdora.config import AdapterConfig
from qdora.data.batches import Packing, collate
from qdora.data.tokenize import TokenizedExample
from qdora.errors import InputError
from qdora.training import attention
from qdora.training.attention import (
    FAMILIES,
    IMPLEMENTATION,
    causal_attention,
    check_packing,
    training_attention,
)
from qdora.training.loss import completion_loss
from tests import tiny
from tests.unit.adapters.oracle import move_off_the_identity, relative

from .trainers import make_trainer, parameters, run

SIZES = tiny.SIZES | {
    "head_dim": 16,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,  # what is normalized is not next to nothing
}
WINDOWS = {
    "gemma3_text": {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "mistral": {"sliding_window": 6},
    "phi3": {"sliding_window": 6},
    "qwen2": {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 1},
    "smollm3": {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 1},
    "starcoder2": {"sliding_window": 6},
}
"""A window shorter than some sequences, where the family has one; in one of two layers where it can be."""


def make_family(name: str):
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **SIZES, **WINDOWS.get(name, {}))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    linears = {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if type(m) is torch.nn.Linear}
    targets = sorted(linears - {"lm_head"})
    inject(model, AdapterConfig(r=4, alpha=12, targets=targets, dtype="float32"), seed=1)
    for seed, layer in enumerate(adapted_layers(model).values()):
        move_off_the_identity(layer, seed)
    return model.train()


def sequences(lengths=(5, 14, 9, 9, 3), seed=5):
    generator = torch.Generator().manual_seed(seed)
    return [
        TokenizedExample(torch.randint(4, 90, (n,), generator=generator).tolist(), 1 + n // 3, str(n))
        for n in lengths
    ]


def loss_and_gradients(model, batch):
    model.zero_grad()
    with training_attention(model):
        loss = completion_loss(model, batch)
        loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_joined_equals_padded_and_transformers(family, recomputed):
    """Catches: a sequence that sees the one before it, positions that run on, a window that is not kept, a
    label of the next sequence's first token, another attention when a layer is computed again."""
    model = make_family(family)
    examples = sequences()
    plain = completion_loss(model, collate(examples, 0))  # with transformers' own masks
    if recomputed:
        model.activation_checkpointing_enable({"use_reentrant": False})
    padded, expected = loss_and_gradients(model, collate(examples, 0))
    joined, got = loss_and_gradients(model, collate(examples, 0, joined=True))
    assert model.config._attn_implementation == "sdpa"
    assert float(padded) == float(plain.detach())
    assert float(joined) == pytest.approx(float(padded), rel=1e-6)
    assert max(relative(got[n], expected[n]) for n in expected) < 1e-5
    whole, parts = torch.cat([g.flatten() for g in got.values()]), expected.values()
    assert relative(whole, torch.cat([g.flatten() for g in parts])) < 1e-6


def test_every_window_is_shorter_than_a_sequence():
    """Catches: a family whose window no test sees."""
    for family in FAMILIES:
        config = AutoConfig.for_model(family, **SIZES, **WINDOWS.get(family, {}))
        assert (getattr(config, "sliding_window", None) == 6) == (family in WINDOWS), family


@pytest.mark.parametrize("family", ["gpt_neox", "mamba", "qwen3_next", "llama4_text", "gpt_oss"])
def test_other_families_are_refused_by_name(tiny_model_folder, family):
    """Catches: sequences joined for a model whose state or attention runs through all of a row."""
    trainer = make_trainer(tiny_model_folder)
    with pytest.raises(InputError, match=rf"data\.packing: .*'{family}'.*known: gemma.*llama.*: none"):
        check_packing(AutoConfig.for_model(family))
    trainer.model.config.model_type = family
    with pytest.raises(InputError, match=r"data\.packing"):
        type(trainer)(
            trainer.model, trainer.examples, trainer.config, trainer.context, 0, packing=Packing(joined=True)
        )
    with training_attention(trainer.model):
        assert trainer.model.config._attn_implementation == "sdpa"


def test_joined_sequences_need_their_attention(tiny_model_folder):
    """Catches: a joined batch under an attention that takes it for one sequence."""
    model = make_trainer(tiny_model_folder).model
    with pytest.raises(AssertionError, match="outside of training_attention"):
        completion_loss(model, collate(sequences(), 0, joined=True))
    with training_attention(model):
        assert model.config._attn_implementation == IMPLEMENTATION
    assert model.config._attn_implementation == "sdpa"


def test_positions_begin_anew(tiny_model_folder):
    """Catches: positions that run on through a row.  Rotary embeddings depend on differences alone, so no
    loss shows it but for rounding and for those that are scaled by length."""
    model, seen = make_trainer(tiny_model_folder).model, []
    rotary = model.model.rotary_emb
    rotary.register_forward_pre_hook(lambda m, a, named: seen.append(named["position_ids"]), with_kwargs=True)
    with training_attention(model):
        completion_loss(model, collate(sequences((4, 2, 3)), 0, joined=True))
        completion_loss(model, collate(sequences((4, 2, 3)), 0))
    assert seen[0].tolist() == [[0, 1, 2, 3, 0, 1, 0, 1, 2]]
    assert seen[1].tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_variable_length_kernel_is_told_the_same(monkeypatch, window, dropout):
    """Catches: ends, window, scale or heads that the GPU's kernel gets otherwise than the loop over
    sequences; a dropout of weights, which it does not have, left out."""
    calls = []

    def reference(
        q_THD, k_TGD, v_TGD, ends_S1, ends_k_S1, longest, longest_k, *, scale, window_size, enable_gqa
    ):
        assert ends_S1 is ends_k_S1
        assert ends_S1.dtype == torch.int32
        assert longest == longest_k == max(ends_S1.diff()) == 9
        assert enable_gqa
        calls.append(window_size)
        outputs = []
        for start, end in zip(ends_S1[:-1].tolist(), ends_S1[1:].tolist(), strict=True):
            back_TT = torch.arange(end - start)[:, None] - torch.arange(end - start)
            left = window_size[0] if window_size[0] >= 0 else end
            mask_TT = (back_TT <= left) & (back_TT >= -window_size[1])
            q, k, v = (x[start:end].transpose(0, 1) for x in (q_THD, k_TGD, v_TGD))
            out = F.scaled_dot_product_attention(q, k, v, mask_TT, scale=scale, enable_gqa=True)
            outputs.append(out.transpose(0, 1))
        return torch.cat(outputs)

    monkeypatch.setattr(varlen, "varlen_attn", reference)
    module = torch.nn.Module()
    module.is_causal, module.num_key_value_groups = True, 2
    generator = torch.Generator().manual_seed(2)
    heads = [
        torch.randn(1, h, 26, 16, generator=generator, dtype=torch.float16).to(torch.bfloat16)
        for h in (4, 2, 2)
    ]
    segments = collate(sequences((5, 9, 9, 3)), 0, joined=True).segments
    options = {"scaling": 0.3, "sliding_window": window, "segments": segments, "dropout": dropout}
    torch.manual_seed(0)
    by_loop, _ = causal_attention(module, *heads, None, **options)
    monkeypatch.setattr(attention, "flash_device", lambda device: True)
    torch.manual_seed(0)
    by_kernel, _ = causal_attention(module, *heads, None, **options)
    assert calls == ([] if dropout else [(-1 if window is None else 3, 0)])
    assert by_kernel.shape == by_loop.shape == (1, 26, 4, 16)
    assert relative(by_kernel.float(), by_loop.float()) < 1e-2
    # Not for float32, nor for heads of a width that it does not have.
    calls.clear()
    causal_attention(module, *(x.float() for x in heads), None, **options)
    causal_attention(module, *(x[..., :12] for x in heads), None, **options)
    assert calls == []


def test_on_a_cpu_16_bits_are_computed_in_float32():
    """Catches: attention in bfloat16 on a CPU, with a slow backward pass and rounded sums."""
    module = torch.nn.Module()
    module.is_causal, module.num_key_value_groups = True, 1
    torch.manual_seed(0)
    heads = [torch.randn(2, 4, 48, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    by_float64 = [x.detach().double().requires_grad_() for x in heads]
    output_BTHD, _ = causal_attention(module, *heads, None)
    expected_BHTD = F.scaled_dot_product_attention(*by_float64, is_causal=True)
    assert output_BTHD.dtype == torch.bfloat16
    # 2**-7 is one step of bfloat16: where float64 lies between two of its values, float32 may take the other.
    expected_BTHD = expected_BHTD.transpose(1, 2)
    torch.testing.assert_close(output_BTHD, expected_BTHD.to(torch.bfloat16), rtol=2**-7, atol=1e-6)
    change_BTHD = torch.randn_like(output_BTHD)
    output_BTHD.backward(change_BTHD)
    expected_BTHD.backward(change_BTHD.double())
    for x, y in zip(heads, by_float64, strict=True):
        torch.testing.assert_close(x.grad, y.grad.to(torch.bfloat16), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_training_joined_equals_training_padded(tiny_model_folder, accumulation):
    """Catches: joined micro-batches of other examples, or divided by another number of labels."""
    options = {"max_steps": 4, "gradient_accumulation": accumulation}
    padded = make_trainer(tiny_model_folder, **options)
    joined = make_trainer(tiny_model_folder, packing=Packing(joined=True), **options)
    a, b = run(padded), run(joined)
    assert [m.loss for m in b] == pytest.approx([m.loss for m in a], rel=1e-6)
    assert [m.tokens for m in b] == [m.tokens for m in a]
    for name, value in parameters(padded).items():
        assert relative(parameters(joined)[name], value) < 1e-5, name


def test_filled_rows_train_every_example_once_an_epoch(tiny_model_folder):
    """Catches: an example that a full row leaves out, rows beyond their tokens, a mean over rows."""
    packing = Packing(joined=True, row_tokens=128)
    trainer = make_trainer(tiny_model_folder, packing=packing, batch_size=2, gradient_accumulation=2)
    steps = trainer.plan.steps_per_epoch
    trained = [trainer.prepare(step) for step in range(steps)]
    assert sorted(e.origin for batch in trained for e in batch.examples) == sorted(
        e.origin for e in trainer.examples
    )
    micro_batches = [one for batch in trained for one in batch.micro_batches]
    assert all(one.input_ids_BT.shape[0] == 1 and one.input_ids_BT.shape[1] <= 128 for one in micro_batches)
    assert max(len(batch.micro_batches) for batch in trained) == 2
    trainer.total_steps = steps
    for metrics, batch in zip(run(trainer), trained, strict=True):
        assert metrics.tokens == sum(len(e.input_ids) for e in batch.examples)
        assert 0.5 < metrics.loss < 10


@pytest.mark.parametrize(
    ("packing", "words"),
    [
        (Packing(), r"batches: [\d,]+ tokens a step on average; padding is \d+\.\d% of what a step computes"),
        (Packing(joined=True), r"none is padding, which would be \d+\.\d% of what a step computes with"),
        (Packing(joined=True, row_tokens=128), r"none is padding; rows are filled to \d\d\.\d%"),
    ],
)
def test_the_share_of_padding_is_said(tiny_model_folder, packing, words):
    """Catches: a share of another division into micro-batches, or over steps that are not made."""
    trainer = make_trainer(tiny_model_folder, packing=packing, gradient_accumulation=2, max_steps=2)
    trainer.examples = sequences(range(3, 43))
    trainer = replace_packing(trainer, packing)
    said = trainer.batch_sizes()
    assert re.search(words, said), said
    if not packing.row_tokens:
        padded = replace_packing(trainer, Packing())
        ids = [one.input_ids_BT for step in range(2) for one in padded.prepare(step).micro_batches]
        tokens = sum(len(e.input_ids) for step in range(2) for e in padded.prepare(step).examples)
        share = 100 * (1 - tokens / sum(x.numel() for x in ids))
        assert f"{share:.1f}%" in said
        assert f"{tokens / 2:,.0f} tokens" in said


def replace_packing(trainer, packing):
    return type(trainer)(
        trainer.model, trainer.examples, trainer.config, trainer.context, trainer.pad_id, packing=packing
    )
