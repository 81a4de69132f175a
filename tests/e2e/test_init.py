"""`init`: what it writes parses, fits and trains."""

from __future__ import annotations

import json
import shutil

import pytest

from qdora.cli import run_command
from qdora.commands import init as command
from qdora.config_file import load_config
from qdora.errors import InputError

from .runs import write_questions

pytestmark = pytest.mark.e2e


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


@pytest.mark.parametrize(
    ("answers", "kind"),
    [
        (["Yes, it is.", "No."], "text"),
        (["Because the light of the sun is scattered by the air.", "No. 7 is prime."], None),
        (["chat"], None),
    ],
    ids=["short", "free", "chats"],
)
def test_answers_without_numbers(tmp_path, tiny_model_folder, capsys, answers, kind):
    """Catches: a test set for exact match of free text, whose evaluation ends in an error or in 0%; a
    classification without one; a training with nothing to look at; chats without a template."""
    data, output = tmp_path / "mine.jsonl", tmp_path / "mine.yaml"
    if answers == ["chat"]:
        turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So it is."}]
        rows = [
            {"messages": [{"role": "user", "content": f"Is it {i}?"}, *turns[1:], *turns]} for i in range(40)
        ]
    else:
        rows = [{"question": f"Is it {i}?", "answer": answers[i % 2]} for i in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = ["--model", str(tiny_model_folder), "--data", str(data), "--output", str(output)]
    assert run_command("init", [*words, "--gpu-memory", "24GiB"]) == 0
    config = load_config(output)
    if kind:
        assert config.data.test is not None
        assert config.data.validation is None
        assert (config.data.test.answer_kind, config.data.test.held_out) == (kind, 4)
        return
    assert (config.data.test, config.data.validation) == (None, 4)
    assert (config.training.keep_best, config.evaluation.loss_every) == ("loss", 2)
    settings = ["--set", f"output.dir={tmp_path / 'run'}"]
    assert run_command("train", ["--config", str(output), *settings]) == 0
    assert (tmp_path / "run" / "adapter-best" / "adapter_model.safetensors").is_file()


def test_an_architecture_without_weights_or_tokenizer(tmp_path, tiny_model_folder, capsys):
    """Catches: a model that must be downloaded to be planned, settings that do not fit by the planner's own
    estimate, fitting ones passed over, lengths guessed without a word."""
    folder, output = tmp_path / "alone", tmp_path / "small.yaml"
    folder.mkdir()
    shutil.copy(tiny_model_folder / "config.json", folder)
    data = write_questions(tmp_path / "mine.jsonl", 40)
    model = ["--model", "nobody/tiny", "--architecture", str(folder), "--data", str(data), "--reserve", "1B"]
    assert run_command("init", [*model, "--output", str(output), "--gpu-memory", "6MiB"]) == 0
    assert f"{folder} has no tokenizer: lengths are estimated" in capsys.readouterr().err
    config = load_config(output)
    assert (config.model.path, config.model.quantization) == ("nobody/tiny", "nf4")
    assert config.training.gradient_checkpointing
    assert "16 would take 6." in output.read_text()
    figures = tmp_path / "figures.json"
    options = ["--config", str(output), "--architecture", str(folder), "--reserve", "1B"]
    options += ["--gpu-memory", "6MiB", "--json", str(figures)]
    assert run_command("estimate", options) == 0
    assert json.loads(figures.read_text())["fits"]


def test_numbers_follow_from_the_data(tmp_path, tiny_model_folder, capsys):
    """Catches: steps of examples that are held out, a rate of another power of ten, answers that leave no
    room for a question."""
    data, output = tmp_path / "mine.jsonl", tmp_path / "mine.yaml"
    rows = [{"question": f"{i}?", "answer": "It is long. " * 30 + f"The answer is {i}."} for i in range(33)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = ["--model", str(tiny_model_folder), "--data", str(data), "--output", str(output)]
    assert run_command("init", [*words, "--gpu-memory", "24GiB"]) == 0
    assert "# 2 steps each" in output.read_text()  # of 30 examples, 16 at a time
    config = load_config(output)
    assert (config.training.learning_rate, config.evaluation.max_new_tokens) == (2e-4, 256)


def test_the_reserve_is_set_aside(tmp_path, tiny_model_folder, capsys, monkeypatch):
    """Catches: settings that fit into what something else takes."""
    given = []

    def choose(architectures, lengths, context, memory, device):
        given.append((context, memory, device))
        raise InputError("enough")

    monkeypatch.setattr(command, "choose", choose)
    data = write_questions(tmp_path / "mine.jsonl", 20)
    words = ["--model", str(tiny_model_folder), "--data", str(data), "--output", str(tmp_path / "x.yaml")]
    assert run_command("init", [*words, "--gpu-memory", "24GiB", "--reserve", "3GiB"]) == 2
    assert given == [(512, 21 << 30, "cuda")]


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
