"""`chat` as it is used: a question a line from a pipe, and in a terminal."""

from __future__ import annotations

import io
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from qdora.cli import run_command
from tests.forked import InTerminal
from tests.tiny import write_tiny_model

from .runs import ROOT, environment

pytestmark = pytest.mark.e2e

MAIN = ("-c", "from qdora.cli import main; main()", "chat")


def piped(monkeypatch, capsys, text: str, *words: str) -> tuple[int, str, str]:
    """Exit code and both outputs of `chat` with `text` as its input."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    code = run_command("chat", list(words))
    return code, *capsys.readouterr()


def test_lines_of_a_pipe_are_questions(trained, monkeypatch, capsys):
    """Catches: a prompt of the terminal in piped answers, a blank line asked, a run's template not used, an
    answer that depends on the questions before, a failed line that goes unnoticed, a command read as text."""
    run = ("--run", str(trained / "run"), "--max-new-tokens", "6")
    code, alone, _ = piped(monkeypatch, capsys, "C2: 1+1?\n", *run)
    assert code == 0
    code, both, _ = piped(monkeypatch, capsys, "A1: 2+2?\n\nC2: 1+1?\n/quit\nnot asked\n", *run)
    assert code == 0
    assert both.endswith(alone)
    assert ">" not in alone
    code, shown, errors = piped(monkeypatch, capsys, "/system be kind\n/rest\nC2: 1+1?\n", *run)
    assert (code, shown) == (1, alone)
    assert "prompt 'question_answer' has no system turn; allowed with: chat" in errors
    assert "/rest: no such command; did you mean '/reset'?" in errors


def test_the_base_beside_the_adapter(trained, tiny_model_folder, monkeypatch, capsys):
    """Catches: a base that is the adapted model, or answers of which nobody knows whose they are."""
    run = ("--run", str(trained / "run"), "--max-new-tokens", "6")
    code, shown, _ = piped(monkeypatch, capsys, "C2: 1+1?\n", *run, "--base")
    assert code == 0
    adapter, _, base = shown.partition("[base] ")
    _, alone, _ = piped(monkeypatch, capsys, "C2: 1+1?\n", *run)
    assert adapter == "[adapter] " + alone.removesuffix("\n")
    model = ("--model", str(tiny_model_folder), "--max-new-tokens", "6", "--set", "model.dtype=float32")
    _, alone, _ = piped(monkeypatch, capsys, "C2: 1+1?\n", *model)
    assert base == alone


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--temperature", "-1"], "--temperature -1.0; allowed: 0 or more"),
        (["--top-k", "3"], "--top-k is about draws, and --temperature 0 draws nothing"),
        (["--temperature", "1", "--top-p", "1.5"], "--top-p 1.5; allowed: above 0, up to 1"),
        (["--max-new-tokens", "0"], "evaluation.max_new_tokens"),
        (["--system", "be kind"], "prompt 'question_answer' has no system turn"),
    ],
)
def test_bad_options_are_refused(trained, monkeypatch, capsys, words, sentence):
    """Catches: an option that silently does nothing, or ends in a traceback."""
    code, shown, errors = piped(monkeypatch, capsys, "", "--run", str(trained / "run"), *words)
    assert (code, shown) == (2, "")
    assert sentence in errors


def test_a_base_alone_has_no_base_beside_it(tiny_model_folder, monkeypatch, capsys):
    """Catches: the same answer shown twice as if they were a comparison."""
    code, _, errors = piped(monkeypatch, capsys, "", "--model", str(tiny_model_folder), "--base")
    assert code == 2
    assert "--base: there is no adapter to leave out" in errors


def endless_model(folder):
    """A model that never ends an answer: the logit of EOS is 0, and the largest is above."""
    write_tiny_model(folder, max_position_embeddings=20000)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][2] = torch.zeros(64)
    save_file(tensors, file, {"format": "pt"})
    return folder


def test_a_terminal(tmp_path):
    """Catches: a terminal without a prompt, Ctrl-C that ends the program, or is not heard before the answer
    is complete, or spoils the next answer; a last line lost at Ctrl-D."""
    model = endless_model(tmp_path / "model")
    words = (*MAIN, "--model", str(model), "--max-new-tokens", "15000")
    with InTerminal(words, cwd=ROOT, env=environment()) as terminal:
        assert "prompt: question_answer. /help lists the commands" in terminal.read_until("\n> ")
        terminal.type("/help\n")
        assert "/reset        forget the turns so far" in terminal.read_until("\n> ")
        time.sleep(0.5)  # input() hears of a signal between its prompt and its wait at the next key alone
        terminal.type("\x03")
        assert "/quit or Ctrl-D leaves" in terminal.read_until("\n> ")
        terminal.type("who are you?\n")
        terminal.read_until("who are you?")
        time.sleep(1)
        terminal.type("\x03")
        answer = terminal.read_until("\n> ")
        assert 0 < len(answer) < 14000
        assert "leaves" not in answer
        terminal.type("/quit\n")
        assert terminal.wait() == 0
