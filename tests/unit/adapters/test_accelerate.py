"""`accelerate` against PEFT's own computation of the same layers; `PEFT_VERSION` says on which PEFT."""

from __future__ import annotations

import copy
import io
import os
import subprocess
import warnings
from pathlib import Path

import bitsandbytes as bnb
import peft
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import qdora
from qdora.adapters import peft_layers
from qdora.benchmark.peers import linear_4bit
from qdora.errors import InputError
from tests.environments import environment_python

from .oracle import relative

BASES = ("dense", "nf4")
assert peft.__version__ == os.environ.get("PEFT_VERSION", peft.__version__)


class Net(nn.Module):
    """Two layers with biases, of whole blocks: bitsandbytes' CPU kernel reads other shapes wrongly."""

    def __init__(self, base: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.is_loaded_in_4bit = base == "nf4"  # by which PEFT chooses its class
        self.first, self.last = self.linear(128, 64, base, dtype), self.linear(64, 192, base, dtype)

    @staticmethod
    def linear(inputs: int, outputs: int, base: str, dtype: torch.dtype) -> nn.Module:
        layer = nn.Linear(inputs, outputs).to(dtype)
        nn.init.normal_(layer.bias)
        if base == "dense":
            return layer
        quantized = linear_4bit(layer.weight.detach(), dtype)
        quantized.bias = layer.bias
        return quantized

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.first(x)))


def adapted(base: str = "dense", dtype: torch.dtype = torch.float32, **changes) -> PeftModel:
    """A PEFT model off the identity, in training mode; twice the same for the same arguments."""
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 10, "use_dora": True, "target_modules": ["first", "last"]} | changes
    narrow = settings.pop("narrow", False)
    model = get_peft_model(Net(base, dtype), LoraConfig(**settings))
    for name, parameter in model.named_parameters() if narrow else ():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    return off_the_identity(model).train()


@torch.no_grad()
def off_the_identity(model: PeftModel, adapter: str = "default") -> PeftModel:
    for name, parameter in model.named_parameters():
        if f"lora_B.{adapter}" in name:
            parameter.normal_(std=0.3)
        if f"lora_magnitude_vector.{adapter}" in name:
            parameter.mul_(torch.rand_like(parameter) + 0.5)
    return model


def inputs(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(3, 5, 128, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


def outcome(model: nn.Module, x: torch.Tensor, run=None) -> dict[str, torch.Tensor]:
    """Output and all gradients, with the same dropped inputs at every call."""
    model.zero_grad()
    x.grad = None
    torch.manual_seed(7)
    y = (model if run is None else run)(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype))
    return {"y": y.detach(), "x": x.grad} | {
        name.replace("offset", "weight"): p.grad.clone()
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def accelerated(model: PeftModel, **options) -> PeftModel:
    """All its layers, and none by PEFT's own path."""
    report = qdora.accelerate(model, **options)
    assert len(report.accelerated) == 2, report
    assert not report.left
    return model


@pytest.fixture(autouse=True)
def calls(monkeypatch) -> list[str]:
    """The layers that our product computes, in order."""
    seen: list[str] = []
    own = peft_layers._forward
    monkeypatch.setattr(
        peft_layers, "_forward", lambda layer, a, *rest: (seen.append(a.name), own(layer, a, *rest))[1]
    )
    return seen


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], bound: float = 1e-5) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert relative(ours[name], tensor) < bound, name


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
@pytest.mark.parametrize("how", ["narrow", "wide", "autocast"])
def test_in_16_bits_it_is_closer_to_float64_than_peft(base, how):
    """Catches: W x rounded before s takes effect, a norm in 16 bits, small sums under autocast."""
    stored = torch.float32 if how == "autocast" else torch.bfloat16
    model, x = adapted(base, stored, narrow=how == "narrow"), inputs(stored)
    exact = outcome(in_float64(model), x.detach().double().requires_grad_())
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        theirs = outcome(model, x)
        ours = outcome(accelerated(model), x)
    errors = {}
    for name, value in exact.items():
        assert ours[name].dtype == theirs[name].dtype, name
        errors[name] = relative(ours[name], value), relative(theirs[name], value)
    assert errors["y"][0] < errors["y"][1], errors
    own, peft_s = (sum(error[i] ** 2 for error in errors.values()) for i in (0, 1))
    assert own < 0.8 * peft_s, errors


def in_float64(model: PeftModel) -> PeftModel:
    """PEFT's own computation of the same numbers, the weights as the codes say them."""
    exact = copy.deepcopy(model)
    for name in ("first", "last"):
        layer = exact.base_model.model.get_submodule(name)
        weight = peft_layers.adopt_linear(layer.base_layer, name)
        dense = nn.Linear(layer.in_features, layer.out_features)
        dense.weight.data = layer.base_layer.weight.data if weight is None else weight.dense(torch.float32)
        dense.bias = layer.base_layer.bias
        layer.base_layer = dense.requires_grad_(False)
    wide = exact.double()
    for name in ("first", "last"):
        layer = wide.base_model.model.get_submodule(name)
        layer.__class__ = peft_layers.LoraLinear
        layer.fan_in_fan_out = False
    return wide


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
def test_adapters_are_switched_mixed_and_merged_by_peft(base, calls):
    """Catches: an adapter that came later left out, or one that is off, merged or beside another taken."""
    model, x = adapted(base, lora_dropout=0.2), inputs()
    model.add_adapter("plain", LoraConfig(r=3, target_modules=["first"]))
    accelerated(model)
    later = LoraConfig(r=2, lora_alpha=5, use_dora=True, target_modules=["first", "last"])
    model.add_adapter("later", later)
    off_the_identity(model, "later")
    twin = copy.deepcopy(model)
    qdora.restore(twin)

    def both(run, product: list[str]) -> None:
        calls.clear()
        with torch.random.fork_rng():
            theirs = run(twin)
        assert not calls
        assert relative(run(model), theirs) < 1e-5
        assert [name.rpartition(".")[2] for name in calls] == product

    def disabled(m):
        with m.disable_adapter():
            return m(x)

    both(lambda m: m(x), ["first", "last"])
    both(disabled, [])
    for adapter in ("later", "plain"):
        for m in (model, twin):
            m.set_adapter(adapter)
        both(lambda m: m(x), ["first", "last"] if adapter == "later" else [])
    for m in (model, twin):
        m.base_model.set_adapter(["default", "later"])
    both(lambda m: m(x), [])
    for m in (model, twin):
        m.set_adapter("later")
        m.merge_adapter()
    both(lambda m: m(x), [])
    for m in (model, twin):
        m.unmerge_adapter()
        m.delete_adapter("default")
    both(lambda m: m(x), ["first", "last"])
    with pytest.raises(ValueError, match="DoRA is enabled"):
        model.eval()(x, adapter_names=["later"] * 3)
    merged, expected = model.merge_and_unload(), twin.merge_and_unload()
    assert type(merged.first) is type(expected.first)
    assert relative(merged(x), expected(x)) < 1e-6


def test_files_copies_and_pickles_are_peft_s(tmp_path):
    """Catches: keys of ours in a saved adapter, a copy that computes with the weights of the original."""
    model, x = adapted("nf4"), inputs()
    model.save_pretrained(tmp_path / "before")
    keys = list(model.state_dict())
    accelerated(model)
    model(x)
    model.save_pretrained(tmp_path / "after")
    assert list(model.state_dict()) == keys
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()
    expected = model(x).detach()
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.mul_(2)
    assert torch.equal(copied(x), expected)
    restored = adapted("nf4")
    qdora.accelerate(restored)
    buffer = io.BytesIO()
    torch.save(restored, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), expected)


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


class Kinds(nn.Module):
    """A layer of every kind that is left to PEFT."""

    def __init__(self) -> None:
        super().__init__()
        self.eight = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False).to("cpu")
        self.conv = nn.Conv2d(3, 4, 3)
        self.embed = nn.Embedding(10, 16)
        self.gpt2 = Conv1D(32, 16)
        self.trained, self.hooked, self.zeros, self.moved = (nn.Linear(16, 32) for _ in range(4))


def test_what_is_left_to_peft_is_said():
    """Catches: a layer that computes something else than its weight says; a layer left without a word."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = Kinds()
        model.is_loaded_in_8bit = True
        names = [name for name, _ in model.named_children()]
        model = get_peft_model(model, LoraConfig(use_dora=True, target_modules=names))
    kinds = model.base_model.model
    kinds.trained.base_layer.weight.requires_grad_()
    kinds.hooked.base_layer.register_forward_hook(lambda *_: None)
    add_hook_to_module(kinds.moved.base_layer, AlignDevicesHook("cpu", offload=True))
    with torch.no_grad():
        kinds.zeros.lora_magnitude_vector["default"].weight[3] = 0
    report = qdora.accelerate(model)
    assert not report.accelerated
    said = {name.rpartition(".")[2]: reason for name, reason in report.left.items()}
    assert said.keys() == set(names)
    for name, word in {
        "eight": "8-bit",
        "conv": "Conv2d",
        "embed": "Embedding",
        "gpt2": "(in, out)",
        "trained": "trained",
        "hooked": "hooks",
        "zeros": "zeros",
        "moved": "offload",
    }.items():
        assert word in said[name], said
        assert said[name] in str(report)


def test_a_layer_that_changes_later_goes_back_to_peft(calls):
    """Catches: a hook that is not called, or a gradient of the base weight that is lost."""
    model, x = adapted(), inputs()
    accelerated(model)
    first = model.base_model.model.first
    seen = []
    handle = first.base_layer.register_forward_hook(lambda *_: seen.append(1))
    model(x)
    assert seen
    handle.remove()
    first.base_layer.weight.requires_grad_()
    calls.clear()
    assert outcome(model, x)["base_model.model.first.base_layer.weight"].abs().sum() > 0
    assert calls == ["base_model.model.last"]


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (lambda: Net("dense", torch.float32), {}, "no layer with a DoRA adapter"),
        (lambda: adapted(use_dora=False), {}, "use_dora=True"),
        (adapted, {"magnitude": "fp32"}, "magnitude: got 'fp32'"),
        (adapted, {"dropout_placement": "publshed"}, "did you mean 'published'"),
    ],
)
def test_bad_input_is_refused_before_anything_changes(make, options, words):
    """Catches: a misspelt option ignored; a model without DoRA that seems accelerated."""
    model = make()
    with pytest.raises(InputError, match=words):
        qdora.accelerate(model, **options)
    assert not any(type(m) in peft_layers.ACCELERATED.values() for m in model.modules())


@pytest.mark.parametrize("storage", ["stored", "float32", "offset"])
def test_a_magnitude_in_16_bits_learns_where_asked(storage, tmp_path):
    """Catches: steps that round away without a word; a magnitude saved as its offset, or loaded as one."""
    model, x = adapted("nf4", torch.bfloat16, narrow=True), inputs(torch.bfloat16)
    before = outcome(model, x)
    if storage == "stored":
        with pytest.warns(
            UserWarning, match=r"2 trained magnitudes are stored in bfloat16, which near 0\.\d+"
        ):
            report = qdora.accelerate(model)
        assert "spacing of 0.00" in str(report)
    else:
        report = qdora.accelerate(model, magnitude=storage)
        assert not report.frozen
    assert relative(outcome(model, x)["y"], before["y"]) < 1e-2

    def saved() -> dict[str, torch.Tensor]:
        model.save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "adapter_model.safetensors")
        return {n: t for n, t in tensors.items() if n.endswith("lora_magnitude_vector")}

    start = saved()
    assert len(start) == 2
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if "magnitude" in n], lr=1e-4)
    for _ in range(10):
        outcome(model, x)
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad.sign_()
        optimizer.step()
    moved = saved()
    for name, m_O in start.items():
        step = (moved[name].double() - m_O.double()).abs()
        # 10 steps of 1e-4, most of them in one direction.
        assert step.median() == pytest.approx(0.0 if storage == "stored" else 1e-3, rel=0.1)
    y = outcome(model, x)["y"]
    other = adapted("nf4", torch.bfloat16, narrow=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        qdora.accelerate(other, magnitude=storage)
    peft.set_peft_model_state_dict(other, peft.get_peft_model_state_dict(model))
    assert torch.equal(other.train()(x), y)
    qdora.restore(model)
    assert saved().keys() == moved.keys()
    assert all(torch.equal(tensor, moved[name]) for name, tensor in saved().items())
    assert relative(outcome(model, x)["y"], y) < 1e-2


def test_a_magnitude_that_becomes_16_bits_later_is_said():
    """Catches: a trainer that narrows all adapters once the layers are accelerated."""
    model, x = adapted(), inputs()
    accelerated(model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    with pytest.warns(UserWarning, match="stored in bfloat16") as said:
        model(x)  # through two layers
    assert len(said) == 1


@pytest.mark.parametrize("version", ["0.18.0", "0.19.1", "0.20.0"])
def test_the_same_holds_on_older_versions_of_peft(version):
    """Catches: a name or a signature that PEFT has changed between 0.18 and the version installed here."""
    python = environment_python(f"peft-{version}")
    chosen = "peft_s or switched or files or 16_bits_learns or trained"
    words = [python, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(Path(__file__)), "-k", chosen]
    there = {"cwd": Path(__file__).parents[3], "env": os.environ | {"PEFT_VERSION": version}}
    done = subprocess.run(words, capture_output=True, text=True, check=False, **there)
    assert done.returncode == 0, done.stdout[-3000:]
