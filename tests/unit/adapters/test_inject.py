"""Choosing layers, freezing the rest, and refusing what cannot be adapted."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from qdora.adapters.inject import adapted_layers, initial_update_fingerprint, inject
from qdora.errors import InputError
from qdora.models.load import load_base
from tests.axes import adapter_config
from tests.tiny import tiny_config


def make_model(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config(**changes))


def test_report_and_freezing():
    """Catches: a parameter outside the adapter left trainable, or counted wrongly."""
    model = make_model()
    report = inject(model, adapter_config(method="qdora", r=4, targets=("q_proj", "mlp.up_proj")))
    assert report.update_layers == (
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.up_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    )
    per_block = (64 + 64) * 4 + 64 + (64 + 96) * 4 + 96
    assert report.trainable == 2 * per_block
    assert {n.rsplit(".", 1)[-1] for n, p in model.named_parameters() if p.requires_grad} == {
        "a_RI",
        "b_OR",
        "offset_O",
    }
    untouched = sum(p.numel() for p in make_model().parameters())
    assert report.total == untouched + report.trainable


@pytest.mark.parametrize(
    ("pattern", "count"),
    [("o_proj", 2), ("model.layers.1.mlp.gate_proj", 1), ("model.layers.0.*", 7), ("*.self_attn.?_proj", 8)],
)
def test_patterns(pattern, count):
    """Catches: a suffix that matches half a name, or a glob that is not over the full name."""
    assert len(inject(make_model(), adapter_config(r=4, targets=(pattern,))).update_layers) == count


def test_pattern_without_a_match_names_the_nearest():
    """Catches: a typo in a target that trains fewer layers than the user thinks."""
    with pytest.raises(InputError, match=r"'q_prj' matches no linear layer; did you mean 'q_proj'\?"):
        inject(make_model(), adapter_config(targets=("v_proj", "q_prj")))


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("layers.0.*_proj", r"for example model\.layers\.0\.\S+: '\*\.layers\.0\.\*_proj' matches 7 layers"),
        ("self_attn", r"for example model\.layers\.0\.\S+: '\*\.self_attn\.\*' matches 8 layers"),
        ("model.layers.1", r"'model\.layers\.1\.\*' matches 7 layers"),
        (r".*\.(q|v)_proj", "it is no regular expression, but a name, a dotted suffix of one or a glob"),
    ],
)
def test_a_part_of_the_model_is_named_as_a_pattern(pattern, words):
    """Catches: 'did you mean q_proj?' for a tower or a projector that is there, under a longer name."""
    with pytest.raises(InputError, match=words):
        inject(make_model(), adapter_config(targets=("v_proj", pattern)))


def test_a_numbered_layer_is_named_with_its_parent():
    """Catches: 'this model has: 0, 2', which names no layer that a pattern could mean."""
    model = nn.ModuleDict({"net": nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))})
    with pytest.raises(InputError, match=r"this model has: net\.0, net\.2$"):
        inject(model, adapter_config(r=2, targets=("q_proj",)))


def test_a_layer_that_is_read_and_not_called_is_refused():
    """Catches: an adapter on the output of torch's attention that changes nothing and gets no gradient."""
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "head": nn.Linear(8, 4)})
    with pytest.raises(InputError, match=r"attention\.out_proj belongs to a MultiheadAttention of torch"):
        inject(model, adapter_config(r=2, targets=("out_proj",)))
    inject(model, adapter_config(r=2, targets=("head",)))
    assert nn.functional.linear(torch.ones(2, 8), model.head.weight).isnan().all()
    weight = model.bfloat16().head.weight
    assert (weight.shape, weight.dtype) == ((4, 8), torch.bfloat16)


def test_half_a_name_does_not_match():
    """Catches: 'proj' taken for every projection."""
    with pytest.raises(InputError, match="matches no linear layer"):
        inject(make_model(), adapter_config(targets=("proj",)))


def test_rank_above_a_side_is_refused_before_anything_changes():
    """Catches: half an injection left behind by a late error."""
    model = make_model()
    with pytest.raises(InputError, match=r"adapter.r is 33, larger .*k_proj \(32x64\); allowed: 1 to 32"):
        inject(model, adapter_config(r=33, targets=("q_proj", "k_proj")))
    assert not adapted_layers(model)
    assert all(p.requires_grad for p in model.parameters())


def test_a_second_adapter_is_refused():
    """Catches: an adapter silently replaced by a fresh one."""
    model = make_model()
    inject(model, adapter_config(r=4))
    with pytest.raises(InputError, match="has an adapter already"):
        inject(model, adapter_config(r=4))


def test_a_tied_output_layer_is_refused_by_name():
    """Catches: an adapter on the output layer that changes the embedding as well."""
    with pytest.raises(InputError, match=r"lm_head shares its weight with model.embed_tokens"):
        inject(make_model(), adapter_config(r=4, targets=("lm_head",), method="dora"))


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_loaded_base_keeps_its_format(tiny_model_folder, quantization):
    """Catches: an adapter that quantizes a 16-bit base on its own account, or the other way round."""
    model, _ = load_base(str(tiny_model_folder), quantization=quantization)
    inject(model, adapter_config(r=4), quantization="int8")
    assert {layer.base.quantization for layer in adapted_layers(model).values()} == {quantization}


def test_magnitude_targets_are_their_own_list():
    """Catches: a magnitude put where only a direction was asked for."""
    model = make_model()
    inject(model, adapter_config(r=4, targets=("q_proj", "v_proj"), magnitude_targets=("v_proj", "o_proj")))
    kinds = {
        name.rsplit(".", 1)[-1]: (layer.update is not None, layer.magnitude is not None)
        for name, layer in adapted_layers(model).items()
    }
    assert kinds == {"q_proj": (True, False), "v_proj": (True, True), "o_proj": (False, True)}


def test_initial_a_depends_on_seed_and_layer_alone():
    """Catches: arms of a comparison that start from different A, or layers that all start alike."""
    first, second, third = make_model(), make_model(), make_model()
    inject(first, adapter_config(r=4, method="qlora"), seed=3)
    torch.randn(100)
    inject(second, adapter_config(r=4, method="qdora"), seed=3)
    inject(third, adapter_config(r=4, method="qdora"), seed=4)
    assert (
        initial_update_fingerprint(first)
        == initial_update_fingerprint(second)
        != initial_update_fingerprint(third)
    )
    layers = adapted_layers(first)
    a0 = layers["model.layers.0.self_attn.q_proj"].update.a_RI
    a1 = layers["model.layers.1.self_attn.q_proj"].update.a_RI
    assert not torch.equal(a0, a1)


def test_gradient_checkpointing_gives_the_same_gradients(tiny_model_folder):
    """Catches: a recomputed forward that differs from the first, in its norm or its dropout mask."""
    grads = []
    for checkpointing in (False, True):
        model, _ = load_base(str(tiny_model_folder))
        inject(model, adapter_config(r=4, dropout=0.3))
        for layer in adapted_layers(model).values():
            with torch.no_grad():
                layer.update.b_OR.fill_(0.01)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
        torch.manual_seed(5)
        ids = torch.arange(4, 24).view(2, 10)
        model(input_ids=ids, labels=ids).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]), name
