"""`adapter.from` with the real commands: provenance, resume, export, two sharded ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qdora.adapters.peft_io import load_adapter
from qdora.adapters.saved import read_saved
from qdora.cli import run_command
from qdora.config_file import load_config
from qdora.models.load import load_base
from tests.distributed.ranks import ends, start_ranks
from tests.unit.adapters.test_continue import logits, relative

from .runs import tiny_tree, write_config

pytestmark = pytest.mark.e2e


def continued(folder: Path, model: Path, **training: Any) -> dict[str, Any]:
    """A run of four steps at a constant rate that goes on from `folder`/first."""
    folder.mkdir(exist_ok=True)
    tree = tiny_tree(folder, model, max_steps=4, save_every=2, schedule="constant", **training)
    return tree | {"adapter": {"from": str(folder.parent / "first"), "dropout": 0.1}}


def trained(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "run" / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_model_folder) -> Path:
    """`first`: a PEFT adapter, float32; `second/run`: what went on from it."""
    folder = tmp_path_factory.mktemp("continued")
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], use_dora=True)
    theirs = peft.get_peft_model(plain, settings)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name or "magnitude" in name:
                parameter.mul_(1.1).add_(0.03)
    theirs.peft_config["default"].base_model_name_or_path = "somebody/else"
    theirs.save_pretrained(folder / "first")
    config = write_config(folder, continued(folder / "second", tiny_model_folder))
    assert run_command("train", ["--config", config]) == 0
    return folder


def test_provenance(runs, tiny_model_folder):
    """Catches: a manifest that does not say what a run went on from, a resolved configuration without the
    adapter's settings; a run that says so and begins anew."""
    first = load_file(runs / "first" / "adapter_model.safetensors")
    assert all(relative(tensor, first[name]) < 0.3 for name, tensor in trained(runs / "second").items())
    manifest = json.loads((runs / "second" / "run" / "manifest.json").read_text())
    assert manifest["adapter_from"] == {
        "path": str((runs / "first").resolve()),
        "fingerprint": read_saved(runs / "first").digest,
        "base_fingerprint": None,
        "base_model": "somebody/else",
    }
    adapter = load_config(runs / "second" / "run" / "config.yaml").adapter
    assert (adapter.r, adapter.alpha, adapter.targets) == (4, 8.0, ("q_proj", "up_proj"))
    assert adapter.dtype == "float32"
    assert adapter.from_ == str(runs / "first")


def test_it_exports_what_it_trained(runs, tiny_model_folder, tmp_path):
    """Catches: an export of the adapter that the run went on from, or of the magnitude's offset alone."""
    out = tmp_path / "merged"
    assert run_command("export", ["--run", str(runs / "second" / "run"), "--output", str(out)]) == 0
    model, _ = load_base(str(tiny_model_folder), dtype="float32")
    load_adapter(model, runs / "second" / "run" / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    first, _ = load_base(str(tiny_model_folder), dtype="float32")
    load_adapter(first, runs / "first")
    assert relative(logits(merged), logits(model)) < 1e-3 < relative(logits(first), logits(model))


def test_resume_takes_the_checkpoint(runs, tiny_model_folder, tmp_path, capsys):
    """Catches: the adapter of adapter.from written over the checkpoint's, a magnitude whose frozen part is
    the base's after a resume, another adapter accepted in its place."""
    tree = continued(runs / "again", tiny_model_folder)
    config = write_config(runs / "again", tree)
    assert run_command("train", ["--config", config, "--set", "training.max_steps=2"]) == 0
    assert run_command("train", ["--config", config, "--resume"]) == 0
    expected = trained(runs / "second")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in trained(runs / "again").items())
    assert "it names 'somebody/else' as its base, this run has " in capsys.readouterr().err
    other = ["--set", f"adapter.from={runs / 'second' / 'run' / 'adapter'}"]
    assert run_command("train", ["--config", config, "--resume", *other]) == 2
    assert "written with adapter.from = " in capsys.readouterr().err
    inside = ["--set", f"adapter.from={runs / 'again' / 'run' / 'adapter'}", "--set", "output.overwrite=true"]
    assert run_command("train", ["--config", config, *inside]) == 2
    assert "is in output.dir" in capsys.readouterr().err


def test_two_sharded_ranks(runs, tiny_model_folder, tmp_path):
    """Catches: a rank that goes on from a fresh start, shards of A and B of the wrong rows."""
    tree = continued(runs / "sharded", tiny_model_folder) | {"adapter": {"from": str(runs / "first")}}
    one = tree | {"output": {"dir": str(tmp_path / "run")}}
    words = ["train", "--config", write_config(runs / "sharded", tree)]
    for code, output in ends(start_ranks([words, words], [runs, runs]), within=300):
        assert code == 0, output[-4000:]
    assert run_command("train", ["--config", write_config(tmp_path, one)]) == 0
    ours, theirs = trained(runs / "sharded"), trained(tmp_path)
    assert ours.keys() == theirs.keys()
    assert all(relative(ours[name], theirs[name]) < 1e-4 for name in ours)
