"""`adapter.trainable_tokens` with the real commands: train, resume, evaluate, export, go on, estimate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qdora.cli import run_command
from tests.tiny import tiny_config

from .runs import tiny_tree, write_config

pytestmark = pytest.mark.e2e

V = tiny_config().vocab_size
KEY = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model_folder) -> Path:
    """`run`, interrupted and resumed, and `straight`: answers end in a token that the tokenizer lacked."""
    folder = tmp_path_factory.mktemp("tokens")
    tree = tiny_tree(folder, tiny_model_folder, max_steps=4, save_every=2, schedule="constant")
    tree["adapter"]["trainable_tokens"] = ["<|im_end|>", "</s>"]
    tree["data"]["parse_special_tokens"] = True
    for split in ("train", "test"):
        path = Path(tree["data"][split]["path"])
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(r | {"answer": r["answer"] + "<|im_end|>"}) + "\n" for r in rows))
    config = write_config(folder, tree)
    straight = ["--set", f"output.dir={folder / 'straight'}"]
    assert run_command("train", ["--config", config, *straight]) == 0
    assert run_command("train", ["--config", config, "--set", "training.max_steps=2"]) == 0
    assert run_command("train", ["--config", config, "--resume"]) == 0
    return folder


def test_it_trains_and_resumes(run, tiny_model_folder):
    """Catches: rows left out of the optimizer, of the checkpoint or of the adapter; a resumed run whose rows
    start again; a tokenizer that is not saved, or without the token."""
    resumed, straight = (
        load_file(run / d / "adapter/adapter_model.safetensors") for d in ("run", "straight")
    )
    assert all(torch.equal(tensor, straight[name]) for name, tensor in resumed.items())
    rows = resumed[KEY]
    table = load_file(tiny_model_folder / "model.safetensors")["model.embed_tokens.weight"].float()
    starts = torch.stack([table[2], table.mean(0)])
    assert rows.shape == (2, 64)
    assert (rows - starts).abs().max(1).values.min() > 1e-4  # both moved
    assert (rows - starts).abs().max() < 1e-2
    settings = json.loads((run / "run/adapter/adapter_config.json").read_text())
    assert settings["trainable_token_indices"] == {"embed_tokens": [2, V]}
    assert AutoTokenizer.from_pretrained(run / "run/adapter").convert_tokens_to_ids("<|im_end|>") == V
    manifest = json.loads((run / "run/manifest.json").read_text())
    assert manifest["trainable_parameters"] == sum(t.numel() for t in resumed.values())


def test_evaluate_and_export(run, tmp_path, capsys):
    """Catches: a base without rows for the tokens of an adapter, merged weights of another vocabulary than
    the tokenizer's."""
    for weights in ("merged", "adapted"):
        words = ["--run", str(run / "run"), "--set", f"evaluation.weights={weights}"]
        assert run_command("evaluate", words) == 0
    assert run_command("export", ["--run", str(run / "run"), "--output", str(tmp_path / "out")]) == 0
    assert "verified" in capsys.readouterr().out
    onto = ["--output", str(tmp_path / "onto"), "--onto", "original"]
    assert run_command("export", ["--run", str(run / "run"), *onto]) == 0
    for name in ("out", "onto"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        assert model.config.vocab_size == len(tokenizer) == V + 1


def test_go_on(run, tmp_path, capsys):
    """Catches: rows that start again, tokens of one run taken for those of another."""
    config = ["--config", str(run / "config.yaml"), "--set", f"output.dir={tmp_path / 'next'}"]
    config += ["--set", f"adapter.from={run / 'run/adapter'}", "--set", "training.learning_rate=1e-9"]
    assert run_command("train", config) == 0
    before, after = (
        load_file(f / "adapter/adapter_model.safetensors")[KEY] for f in (run / "run", tmp_path / "next")
    )
    assert (before - after).abs().max() < 1e-6
    other = ["--set", "adapter.trainable_tokens=['<|im_end|>']", "--set", f"output.dir={tmp_path / 'other'}"]
    assert run_command("train", [*config, *other]) == 2
    assert "has rows of the ids" in capsys.readouterr().err


def test_estimate(run, capsys):
    """Catches: a planner that cannot build what a run trains."""
    assert run_command("estimate", ["--config", str(run / "config.yaml"), "--device", "cpu"]) == 0
    assert "total" in capsys.readouterr().out
