"""`accelerate` against PEFT's own computation of the same layers; `PEFT_VERSION` says on which PEFT."""

from __future__ import annotations

import peft
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import qdora
from qdora.adapters import peft_layers

from .accelerated import (
    BASES,
    SIXTEEN_BITS,
    accelerated,
    adapted,
    as_on_cuda,
    distances,
    inputs,
    outcome,
    same,
)
from .oracle import relative


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lora_dropout": 0.3},
        {"use_rslora": True, "rank_pattern": {"last": 8}, "alpha_pattern": {"first": 3}},
        {"bias": "all"},
    ],
    ids=["plain", "dropout", "patterns", "bias"],
)
def test_outputs_and_gradients_are_peft_s(base, changes, calls):
    """Catches: a norm of the wrong scale, a bias scaled by the magnitude, inputs of W x that PEFT drops."""
    model, x = adapted(base, **changes), inputs()
    theirs = outcome(model, x)
    accelerated(model)
    same(outcome(model, x), theirs)
    assert calls == ["base_model.model.first", "base_model.model.last"]
    if base == "dense":  # in evaluation bitsandbytes repacks 4-bit layers on some CPUs, with other scales
        qdora.restore(model)
        off = model.eval()(x)
        accelerated(model)
        assert relative(model(x), off) < 1e-5
    qdora.restore(model)
    assert type(model.base_model.model.first) in peft_layers.ACCELERATED
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in outcome(model.train(), x).items())


def test_dropout_of_the_branch_alone_leaves_the_base(calls):
    """Catches: the option without an effect.  With B = 0 the output is the undropped base's, scaled."""
    model, x = adapted("nf4", lora_dropout=0.5), inputs()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    accelerated(model, dropout_placement="branch")
    undropped = outcome(model.eval(), x)["y"]
    assert relative(outcome(model.train(), x)["y"], undropped) < 1e-6
    accelerated(model, dropout_placement="published")
    assert relative(outcome(model, x)["y"], undropped) > 0.05


@pytest.mark.filterwarnings("ignore:.* stored in bfloat16")
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("how", SIXTEEN_BITS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_in_16_bits_it_is_closer_to_float64_than_peft(base, how, device, monkeypatch):
    """Catches: W x rounded before s takes effect, a norm in 16 bits, small sums under autocast.

    With the roundings of CUDA float32 adapters of a 16-bit model are the case where PEFT, which computes them
    in float32, is as near: docs/peft.md says so.
    """
    for module, name, value in as_on_cuda() if device == "cuda" else ():
        monkeypatch.setattr(module, name, value)
    errors = distances(base, how)
    assert errors["y"][0] < (1 if device == "cpu" else 1.1) * errors["y"][1], errors
    own, peft_s = (sum(error[i] ** 2 for error in errors.values()) for i in (0, 1))
    assert own < (1.4 if (device, how) == ("cuda", "wide") else 0.8) * peft_s, errors


def test_small_moves_of_a_magnitude_come_through_under_autocast():
    """Catches: s times a weight of 16 bits, rounded back to that weight where bfloat16 is multiplied."""
    model, x = adapted("dense", target_modules=["first"]).base_model.model.first, inputs()
    m_O = model.lora_magnitude_vector["default"].weight
    with torch.no_grad():
        model.base_layer.weight.data = model.base_layer.weight.bfloat16().float()
        model.base_layer.bias.zero_()
        model.lora_B["default"].weight.zero_()
        m_O.copy_(model.base_layer.weight.norm(dim=1))
    qdora.accelerate(model)
    found = []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            found.append(outcome(model, x)["x"].double())
        with torch.no_grad():
            m_O.mul_(1 + 1e-3)
    before, after = found
    # Of a layer without an update it is the gradient of W x, times s; `OFF_GRID` keeps 89% of such a move.
    share = ((after - before).flatten() @ before.flatten()) / (1e-3 * before.square().sum())
    assert float(share) == pytest.approx(1, abs=0.13)


def test_a_norm_is_never_stale():
    """Catches: a norm kept over a fused step, one of another library, new scales, merges and loads."""
    model, twin, x = adapted("dense"), adapted("dense"), inputs()
    accelerated(model)
    models = (model, twin)

    def step(optimizer):
        for each in models:
            outcome(each, x)
            optimizer([p for p in each.parameters() if p.requires_grad]).step()

    class Behind(torch.optim.SGD):
        """Writes as DeepSpeed and 8-bit optimizers do."""

        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                p.data.sub_(p.grad.data, alpha=0.1)

    def layers(each):
        return [each.base_model.model.get_submodule(name) for name in ("first", "last")]

    changes = {
        "fused": lambda: step(lambda p: torch.optim.AdamW(p, lr=0.1, fused=True)),
        "foreach": lambda: step(lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True)),
        "behind": lambda: step(Behind),
        "set_scale": lambda: [layer.set_scale("default", 0.3) for m in models for layer in layers(m)],
        "scale_layer": lambda: [layer.scale_layer(2.0) for m in models for layer in layers(m)],
        "unscale_layer": lambda: [layer.unscale_layer() for m in models for layer in layers(m)],
        "base": lambda: (
            [layer.base_layer.weight.data.mul_(1.5) for m in models for layer in layers(m)]
            and [m.base_model.model.load_state_dict(m.base_model.model.state_dict()) for m in models]
        ),
        "adapter": lambda: [
            peft.set_peft_model_state_dict(
                m, {name: 1.1 * tensor for name, tensor in peft.get_peft_model_state_dict(m).items()}
            )
            for m in models
        ],
        "merge": lambda: [(m.merge_adapter(), m.unmerge_adapter()) for m in models],
        "double": lambda: [m.double() for m in models] and None,
    }
    for name, change in changes.items():
        same(outcome(model, x), outcome(twin, x), 1e-4)  # both kept what is known
        change()
        if name == "double":
            x = x.detach().double().requires_grad_()
        before, after = outcome(twin, x), outcome(model, x)
        assert relative(after["y"], before["y"]) < 1e-5, name
        with torch.inference_mode():
            assert relative(model(x), twin(x)) < 1e-5, name


@pytest.mark.parametrize("base", BASES)
def test_nothing_is_copied_or_quantized_again(base):
    """Catches: codes or weights of our own beside PEFT's."""
    model, x = adapted(base), inputs()
    pointers = {name: p.data_ptr() for name, p in model.named_parameters()}
    accelerated(model)
    model(x).sum().backward()
    assert pointers == {name: p.data_ptr() for name, p in model.named_parameters()}
    for name in ("first", "last"):
        layer = model.base_model.model.get_submodule(name)
        weight = layer.qdora.weight(layer.base_layer)
        stored = weight.packed if base == "nf4" else weight.weight
        assert stored.data_ptr() == layer.base_layer.weight.data_ptr()
        if base == "nf4":
            assert weight.absmax.data_ptr() == layer.base_layer.weight.quant_state.absmax.data_ptr()


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_activations_give_the_same_gradients(reentrant):
    """Catches: other dropped inputs, or other tensors kept, in the second forward pass."""
    model, x = adapted("nf4", lora_dropout=0.2), inputs()
    accelerated(model)
    expected = outcome(model, x)
    same(outcome(model, x, lambda x: checkpoint(model, x, use_reentrant=reentrant)), expected, 1e-6)


def test_compiled_it_computes_the_same(calls):
    """Catches: a graph that keeps the norm of the factors that it was traced with."""
    model, x = adapted(), inputs()
    compiled = torch.compile(accelerated(model), backend="eager")
    for _ in range(2):
        expected = outcome(model, x)
        calls.clear()
        same(outcome(model, x, compiled), expected)
        assert not calls  # PEFT's own
        with torch.no_grad():
            model.base_model.model.first.lora_B["default"].weight.mul_(1.7)


def test_frozen_magnitudes_and_saved_modules_stay_what_they_are():
    """Catches: a gradient for what is not trained; modules beside the layers touched."""
    model, x = adapted(modules_to_save=["last"], target_modules=["first"]), inputs()
    model.base_model.model.first.lora_magnitude_vector.requires_grad_(False)
    theirs = outcome(model, x)
    assert qdora.accelerate(model).accelerated == ("base_model.model.first",)
    ours = outcome(model, x)
    same(ours, theirs)
    assert not [name for name in ours if "magnitude" in name]
    assert [name for name in ours if "modules_to_save" in name]
