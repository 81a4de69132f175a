"""`demo` on a tiny model: one load, both scores, answers that a person can look at."""

from __future__ import annotations

import re

import pytest
from huggingface_hub import ModelCard

from qdora.cli import run_command
from qdora.evaluation.scores import read_reports

from .runs import ROOT

pytestmark = pytest.mark.e2e


def test_the_demo_loads_once_and_shows_answers(tmp_path, tiny_model_folder, monkeypatch, capsys, calls):
    """Catches: a base that is loaded again for each score, a score before that is not the base's, answers
    picked for what they show, or under another question; a sentence with other figures than the reports."""
    monkeypatch.chdir(tmp_path)
    changes = [f"model.path={tiny_model_folder}", "training.max_steps=2", "training.batch_size=4"]
    changes += ["data.train.count=32", "data.test.count=12", "evaluation.max_new_tokens=8"]
    changes += ["data.max_length=512"]
    words = [word for change in changes for word in ("--set", change)]
    assert run_command("demo", ["--config", str(ROOT / "configs" / "quickstart.yaml"), *words]) == 0
    shown = capsys.readouterr().out
    assert calls["load_model"] == 1
    assert calls["load_with_adapter"] == 0
    run = tmp_path / "runs" / "quickstart"
    [before], [after] = read_reports(run / "evaluation-base"), read_reports(run / "evaluation")
    sentence = " ".join(shown.rpartition("more trained by")[2].partition("\n\n")[0].split())
    assert f"of 12 questions that it has not seen, the model answers {after.correct} right" in sentence
    assert f"answered {before.correct} before" in sentence
    assert len(re.findall(r"(?m)^\d+\. ", shown)) == len(re.findall(r"(?m)^   before", shown)) == 10
    first = after.predictions[0].prompt.splitlines()[1]
    assert first[:60] in shown
    assert (tmp_path / "exports" / "quickstart" / "model.safetensors").is_file()
    for folder in (tmp_path / "exports" / "quickstart", run / "adapter"):
        (result,) = ModelCard.load(folder / "README.md").data.eval_results
        assert result.metric_value == pytest.approx(after.score, abs=1e-6)
    assert run_command("evaluate", ["--run", str(run), "--base-only"]) == 0
    [again] = read_reports(run / "evaluation-base")
    assert [p.output for p in again.predictions] == [p.output for p in before.predictions]
    assert run_command("evaluate", ["--run", str(run)]) == 0
    [again] = read_reports(run / "evaluation")
    assert [p.output for p in again.predictions] == [p.output for p in after.predictions]
