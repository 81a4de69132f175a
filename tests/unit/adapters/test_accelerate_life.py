"""An accelerated PEFT model through its life: adapters, files, magnitudes, and what is left to PEFT."""

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
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import qdora
from qdora.adapters import peft_layers
from qdora.errors import InputError
from tests.environments import environment_python

from .accelerated import BASES, Net, accelerated, adapted, inputs, off_the_identity, outcome
from .oracle import relative


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


def test_codes_stored_as_wider_numbers_are_left():
    """Catches: bytes of `bnb_4bit_quant_storage=bfloat16` read as if each were a number of its own."""
    net = Net("nf4", torch.float32)
    net.first = bnb.nn.Linear4bit(128, 64, quant_type="nf4", quant_storage=torch.bfloat16).to("cpu")
    model = get_peft_model(net, LoraConfig(use_dora=True, target_modules=["first", "last"]))
    report = qdora.accelerate(model)
    assert [name.rpartition(".")[2] for name in report.accelerated] == ["last"]
    ((name, reason),) = report.left.items()
    assert name.endswith("first")
    assert "torch.bfloat16" in reason


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
        (adapted, {"logits": "labeled"}, "did you mean 'labelled'"),
        (adapted, {"logits": "labelled"}, "does not take its loss by"),
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
    if storage == "offset":
        model.bfloat16()  # leaves the start of an offset as it is
        assert all(torch.equal(tensor, moved[name]) for name, tensor in saved().items())
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
    files = [str(path) for path in Path(__file__).parent.glob("test_accelerate*.py")]
    chosen = "peft_s or switched or files or 16_bits_learns or trained"
    words = [python, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files, "-k", chosen]
    there = {"cwd": Path(__file__).parents[3], "env": os.environ | {"PEFT_VERSION": version}}
    done = subprocess.run(words, capture_output=True, text=True, check=False, **there)
    assert done.returncode == 0, done.stdout[-3000:]
