"""A file of chats, from the command that trains it to what a server loads."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, GenerationConfig

from qdora.cli import run_command
from qdora.commands.train import read_inputs
from qdora.config import RunConfig
from qdora.config_file import check_config, load_config, read_yaml
from qdora.data.rows import Turn
from qdora.data.tokenize import prompt_ids
from tools.write_chats import chats, write

from .runs import tiny_tree, write_config

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model_folder) -> tuple[Path, str]:
    """Folder of a run of two steps over chats, and its configuration."""
    folder = tmp_path_factory.mktemp("chats")
    tree: dict[str, Any] = tiny_tree(folder, tiny_model_folder, max_steps=2)
    tree["data"] = {
        "train": {"source": "file", "path": str(write(folder / "chats.jsonl", 40))},
        "validation": 8,
        "max_length": 512,
        "chat_template": "plain",
        "packing": "batch",
    }
    config = write_config(folder, tree)
    assert run_command("train", ["--config", config]) == 0
    return folder, config


def test_it_trains_without_further_keys(finished, capsys):
    """Catches: chats that need a format, a prompt or a test set named before they train; a last line that
    names a command which fails for want of a test set."""
    folder, config = finished
    steps = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 2
    assert load_config(folder / "run" / "config.yaml").data.prompt == "chat"
    manifest = json.loads((folder / "run" / "manifest.json").read_text())
    assert (manifest["data"]["train"], manifest["data"]["test"]) == (32, 0)
    assert run_command("train", ["--config", config, "--resume"]) == 0
    said = capsys.readouterr()
    assert "32 training examples; no test set" in said.err
    assert re.search(r"score it +qdora evaluate --run \S+ --split validation\n", said.out)


def test_going_on_takes_the_template_that_was_trained(finished, tiny_model_folder, tmp_path):
    """Catches: a run that goes on from an adapter over chats and renders them by the base's template, or does
    not save the one that it trained."""
    folder, config = finished
    tree: dict[str, Any] = tiny_tree(tmp_path, tiny_model_folder, max_steps=1)
    tree |= {"adapter": {"from": str(folder / "run" / "adapter")}}
    tree["data"] = {key: value for key, value in first_data(config).items() if key != "chat_template"}
    _, tokenizer, data = read_inputs(check_config(tree, RunConfig, "test"))
    _, _, before = read_inputs(load_config(config))
    assert [example.input_ids for example in data.train] == [example.input_ids for example in before.train]
    assert tokenizer.eos_token == AutoTokenizer.from_pretrained(folder / "run" / "adapter").eos_token
    assert data.keeps_template


def first_data(config: str) -> dict[str, Any]:
    return dict(read_yaml(Path(config))["data"])


def test_evaluation_says_what_to_set(finished, capsys):
    """Catches: a traceback where a run has no test set."""
    folder, _ = finished
    assert run_command("evaluate", ["--run", str(folder / "run")]) == 2
    message = capsys.readouterr().err
    assert "there is no test set: data.test is not set. Name a file with --data" in message
    assert "--split validation" in message


def test_chats_are_scored_where_they_have_numbers(finished, capsys, tmp_path):
    """Catches: prompts without the turns before the answer; scores that end in an error."""
    folder, _ = finished
    words = ["--run", str(folder / "run"), "--set", "evaluation.max_new_tokens=4"]
    assert run_command("evaluate", [*words, "--split", "validation", "--limit", "2"]) == 0
    path = write(tmp_path / "test.jsonl", 2, seed=3)
    assert run_command("evaluate", [*words, "--data", str(path), "--output", str(tmp_path / "out")]) == 0
    lines = (tmp_path / "out" / "test.predictions.jsonl").read_text().splitlines()
    assert len(lines) == 2
    assert all("decoding" not in line for line in lines)
    report = json.loads((tmp_path / "out" / "test.json").read_text())
    assert report["decoding"]["prompt"] == "chat"


def test_the_template_is_beside_the_adapter_and_in_the_export(finished, tmp_path, capsys):
    """Catches: a model that is served with another template, or not stopped at the end of its answer."""
    folder, _ = finished
    out = tmp_path / "out"
    assert run_command("export", ["--run", str(folder / "run"), "--output", str(out)]) == 0
    assert "verified: plain transformers loads it" in capsys.readouterr().out
    messages = chats(1)[0]["messages"]
    turns = tuple(Turn(m["role"], m["content"]) for m in messages[:-1])
    rendered = set()
    for place in (folder / "run" / "adapter", out):
        tokenizer = AutoTokenizer.from_pretrained(place)
        rendered.add(tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True))
        ids = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
        assert prompt_ids(tokenizer, "chat", [turns]) == [ids]
    (text,) = rendered
    assert text.endswith("### Assistant:\n")
    stops = GenerationConfig.from_pretrained(out).eos_token_id
    assert tokenizer.eos_token_id in (stops if isinstance(stops, list) else [stops])


def test_a_template_file_that_is_gone_is_not_needed_again(tiny_model_folder, tmp_path, capsys):
    """Catches: an export with the template of a file that has changed since, or that goes on after an answer
    has ended."""
    template = tmp_path / "own.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role + ':' + m.content + '<s>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    tree: dict[str, Any] = tiny_tree(tmp_path, tiny_model_folder, max_steps=1)
    train = {"source": "file", "path": str(write(tmp_path / "chats.jsonl", 16))}
    tree["data"] = {"train": train, "max_length": 512, "chat_template": str(template), "loss_on": "last"}
    assert run_command("train", ["--config", write_config(tmp_path, tree)]) == 0
    assert "own.jinja'; answers end with '<s>', which is the EOS token now" in capsys.readouterr().err
    text = template.read_text()
    template.unlink()
    words = ["--run", str(tmp_path / "run"), "--output", str(tmp_path / "out"), "--no-verify"]
    assert run_command("export", words) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer.chat_template, tokenizer.eos_token) == (text, "<s>")
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [1, 2]


def test_what_cannot_be_trained_is_said_before_anything_is_written(tiny_model_folder, tmp_path, capsys):
    """Catches: a base model without a template that ends in a traceback, or after a folder was made."""
    tree: dict[str, Any] = tiny_tree(tmp_path, tiny_model_folder, max_steps=1)
    train = {"source": "file", "path": str(write(tmp_path / "chats.jsonl", 16))}
    for more, said in (
        ({}, "data.chat_template: llama3, chatml, plain, or a file"),
        ({"chat_template": "chatml"}, "<|im_end|>, which this tokenizer has not as tokens"),
        ({"chat_template": "plain", "max_length": 16}, "longer than data.max_length 16"),
    ):
        tree["data"] = {"train": train, "max_length": 512, **more}
        assert run_command("train", ["--config", write_config(tmp_path, tree)]) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "run" / "config.yaml").exists()
