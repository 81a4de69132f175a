"""`data`: what it says of a run's data before the run."""

from __future__ import annotations

import json
import re
import sys
import types

import pytest

from qdora.cli import run_command
from qdora.commands import data as command
from qdora.models import load

from .runs import tiny_tree, write_config

pytestmark = pytest.mark.e2e


def show(capsys, config, *words):
    code = run_command("data", ["--config", config, *words])
    return code, capsys.readouterr()


def test_what_a_run_would_train_on(tmp_path, tiny_model_folder, capsys, monkeypatch):
    """Catches: a count, a leak, a repeated row or a reason that is not said, or is another one than in
    training; a mask shown a token off; weights that are loaded for it."""
    monkeypatch.setattr(load, "load_model", None)
    tree = tiny_tree(tmp_path, tiny_model_folder, epochs=2, max_steps=None)
    path = tmp_path / "train.jsonl"
    rows = path.read_text().splitlines()
    leak = json.loads((tmp_path / "test.jsonl").read_text().splitlines()[0])
    long = [{"question": "x" * 200, "answer": "y 1"}, {"question": "x" * 150, "answer": "y 1"}]
    path.write_text("\n".join([*rows, rows[0], *map(json.dumps, [leak, *long]), "{"]) + "\n")
    tree["data"] |= {"bad_rows": "skip", "validation": 0.1}
    config = write_config(tmp_path, tree)
    code, shown = show(capsys, config, "--stats", "--show", "2")
    assert code == 0, shown.err
    assert "training examples, 8 test examples; 1 training examples removed" in shown.out
    assert "10 validation examples left out of training" in shown.out
    assert "3 rows are left out:" in shown.out
    assert re.search(r"  2 as \S*train\.jsonl:99: ", shown.out)  # the first of them
    assert "longer than data.max_length 128" in shown.out
    assert "train.jsonl:101: not valid JSON" in shown.out
    assert "1 training examples repeat the question of another one" in shown.out
    assert shown.out.count("█") > 40
    assert "a step has 8 rows, 8 computed at once on one process; an epoch has 11 steps" in shown.out
    examples = shown.out.split("carry loss\n")[1:]
    assert len(examples) == 2
    for example in examples:
        prompt, _, trained = example.partition("[[")
        assert prompt.startswith("###Question:\n")
        assert prompt.endswith("###Answer:\n")
        assert trained.partition("]]")[0].endswith("</s>")

    monkeypatch.setattr(command, "_coloured", lambda: True)
    code, shown = show(capsys, config, "--set", "data.bad_rows=stop", "--show", "1")
    assert code == 1
    assert "a run stops at the first of them (data.bad_rows: stop)" in shown.out
    assert "</s>\x1b[0m" in shown.out
    assert "[[" not in shown.out


def test_a_chat_with_gaps(tmp_path, tiny_model_folder, capsys):
    """Catches: a later user turn shown or counted as trained, an answer that is trained shown as not."""
    chat = [("user", "Hi?"), ("assistant", "Ho."), ("user", "And?"), ("assistant", "No.")]
    row = {"messages": [{"role": role, "content": text} for role, text in chat]}
    (tmp_path / "chats.jsonl").write_text(f"{json.dumps(row)}\n")
    tree = tiny_tree(tmp_path, tiny_model_folder)
    tree["data"] = {
        "train": {"source": "file", "path": str(tmp_path / "chats.jsonl")},
        "chat_template": "plain",
        "max_length": 256,
    }
    tree["training"]["batch_size"] = 1
    code, shown = show(capsys, write_config(tmp_path, tree))
    assert code == 0, shown.err
    assert "[[Ho.</s>]]\n\n### User:\nAnd?\n\n### Assistant:\n[[No.</s>]]" in shown.out
    of_epoch = re.search(r"epoch has 1 steps and (\d+) tokens, of which (\d+) carry loss", shown.out)
    of_row = re.search(r"chats\.jsonl:1: (\d+) tokens, (\d+) carry loss", shown.out)
    assert of_epoch[1] == of_row[1] != of_epoch[2] == of_row[2]
    assert command._printable("a\x1b[2J\n\u202eb") == "a\\x1b[2J\n\\u202eb"


def test_colours_are_for_terminals_that_want_them(monkeypatch):
    """Catches: codes in a file, or against NO_COLOR."""
    for is_terminal, wish in ((True, ""), (True, "1"), (False, "")):
        monkeypatch.setattr(sys, "stdout", types.SimpleNamespace(isatty=lambda found=is_terminal: found))
        monkeypatch.setenv("NO_COLOR", wish)
        assert command._coloured() == (is_terminal and not wish)


def test_options_are_checked(tmp_path, tiny_model_folder, capsys):
    """Catches: a negative number of examples taken for all but so many."""
    config = write_config(tmp_path, tiny_tree(tmp_path, tiny_model_folder))
    code, shown = show(capsys, config, "--show", "-1")
    assert (code, "--show -1; allowed: 0 or more" in shown.err) == (2, True)
