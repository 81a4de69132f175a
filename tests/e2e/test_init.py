"""`init`: what it writes parses, fits and trains."""

from __future__ import annotations

import json
import shutil

import pytest

from qdora.cli import run_command
from qdora.config_file import load_config

from .runs import ROOT, write_questions

pytestmark = pytest.mark.e2e

LLAMA = ROOT / "configs" / "models" / "llama-3-8b"


def estimated(tmp_path, config, memory: str, *words: str):
    """What `estimate` says of a configuration."""
    figures = tmp_path / "figures.json"
    options = ["--config", str(config), "--gpu-memory", memory, "--json", str(figures), *words]
    assert run_command("estimate", options) == 0
    return json.loads(figures.read_text())


def test_a_tiny_model_trains_as_written(tmp_path, tiny_model_folder, capsys):
    """Catches: a file that the parser refuses, that training refuses, or that lacks a reason; a length that
    leaves out an example; a file written over."""
    data, output = write_questions(tmp_path / "mine.jsonl", 60), tmp_path / "mine.yaml"
    words = ["--model", str(tiny_model_folder), "--data", str(data), "--output", str(output)]
    assert run_command("init", [*words, "--gpu-memory", "24GiB"]) == 0
    assert f"qdora train --config {output}" in capsys.readouterr().out
    config = load_config(output)
    assert (config.model.quantization, config.training.gradient_checkpointing) == ("none", False)
    assert (config.data.max_length, config.data.train.held_out, config.data.bad_rows) == (128, 6, "stop")
    reasons = [line for line in output.read_text().splitlines() if ":" in line and "#" in line]
    assert len(reasons) >= 14
    changes = [f"output.dir={tmp_path / 'run'}", "training.epochs=null", "training.max_steps=2"]
    settings = [word for change in changes for word in ("--set", change)]
    assert run_command("train", ["--config", str(output), *settings]) == 0
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    before = output.read_bytes()
    assert run_command("init", words) == 2
    assert "already exists; name another file with --output" in capsys.readouterr().err
    assert output.read_bytes() == before


def test_an_architecture_without_weights_or_tokenizer(tmp_path, capsys):
    """Catches: a model that must be downloaded to be planned, settings that do not fit by the planner's own
    estimate, fitting ones passed over, lengths guessed without a word."""
    data, output = tmp_path / "long.jsonl", tmp_path / "long.yaml"
    rows = [{"question": "x" * 600, "answer": f"{'y' * 5000} {i}"} for i in range(60)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = ["--model", "meta-llama/Meta-Llama-3-8B", "--architecture", str(LLAMA)]
    words = [*model, "--data", str(data), "--gpu-memory", "16GiB", "--output", str(output)]
    assert run_command("init", words) == 0
    shown = capsys.readouterr()
    assert f"{LLAMA} has no tokenizer: lengths are estimated" in shown.err
    config = load_config(output)
    assert config.model.path == "meta-llama/Meta-Llama-3-8B"
    assert config.model.quantization == "nf4"
    assert config.training.gradient_checkpointing
    assert "16 would take" in output.read_text()
    folder = ("--architecture", str(LLAMA))
    now = estimated(tmp_path, output, "16GiB", *folder)
    assert now["fits"]
    larger = config.training.gradient_accumulation // 2
    if larger:
        assert not estimated(
            tmp_path, output, "16GiB", *folder, "--set", f"training.gradient_accumulation={larger}"
        )["fits"]
    assert run_command("init", [*words[:-1], str(tmp_path / "small.yaml"), "--reserve", "12GiB"]) == 2
    assert "no settings fit in 4.00 GiB" in capsys.readouterr().err
    assert not (tmp_path / "small.yaml").exists()


def test_what_cannot_be_had_is_said(tmp_path, tiny_model_folder, capsys):
    """Catches: a traceback of the hub's client, a configuration of a model or data that nobody can read, a
    folder with a config.json alone refused."""
    data, output = write_questions(tmp_path / "mine.jsonl", 20), tmp_path / "mine.yaml"
    end = ["--data", str(data), "--gpu-memory", "1GiB", "--output", str(output)]
    assert run_command("init", ["--model", "nobody/nothing", *end]) == 2
    assert "its config.json cannot be had from the hub" in capsys.readouterr().err
    missing = ["--model", str(tiny_model_folder), "--data", str(tmp_path / "none.jsonl"), *end[2:]]
    assert run_command("init", missing) == 2
    assert "none.jsonl: no such file" in capsys.readouterr().err
    assert not output.exists()
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(tiny_model_folder / "config.json", alone)
    assert run_command("init", ["--model", str(alone), *end]) == 0
    assert load_config(output).data.prompt == "question_answer"
