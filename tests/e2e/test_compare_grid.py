"""Comparisons with grids, a validation set and arms without training, through the real command."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from qdora.cli import run_command
from qdora.commands import compare
from qdora.data.rows import Example
from qdora.evaluation.scores import Prediction, summarize, write_scores
from qdora.files import file_digest
from qdora.tasks import task_for

from .runs import metrics, start, write_comparison

pytestmark = pytest.mark.e2e

ZERO = {"name": "zero-shot", "train": False}
LONGER = {"name": "longer", "train": False, "set": {"evaluation.max_new_tokens": 12}}
QLORA, QDORA = {"name": "qlora", "set": {"adapter.dora": False}}, {"name": "qdora"}
RATES = {"training.learning_rate": [1e-3, 4e-3]}
VALIDATION = {"data.validation": 5, "evaluation.limit": 4}


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def origins(predictions: Path) -> set[str]:
    return {json.loads(line)["origin"] for line in predictions.read_text().splitlines()}


def contents(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): file_digest(path) for path in files}


def test_a_grid_with_arms_that_are_not_trained(tiny_model_folder, tmp_path, calls, capsys):
    """Catches: a grid scored on the test set; a chosen point trained twice with the first seed; a base scored
    twice; a dry run that writes, reads weights, or refuses less than the comparison does."""
    arms = [ZERO, QLORA, QDORA, LONGER]
    words = write_comparison(tmp_path, tiny_model_folder, arms, seeds=[0, 1], sweep=RATES, set=VALIDATION)
    folder = tmp_path / "comparison"
    assert run_command("compare", [*words, "--dry-run"]) == 0
    page = capsys.readouterr().out
    assert not calls
    assert not folder.exists()
    for words_of_page in (
        "sweep: 0.001, 0.004",
        "| qdora seed 0, training.learning_rate=0.004 | 3 ",
        "Identity checks passed",
        "0 removed from training as test questions, 0 as validation questions; 5 validation examples",
        "unknown until the first arm has been trained and scored",
    ):
        assert words_of_page in page
    wrong = [*words, "--set", "sweep={adapter.r: [65]}"]
    assert run_command("compare", [*wrong, "--dry-run"]) == 2
    assert "arm 'qlora', seed 0, adapter.r=65: adapter.r" in capsys.readouterr().err
    assert not folder.exists()

    assert run_command("compare", words) == 0
    # Two arms at two points, and with another seed; the base with two settings, one of which are the arms'.
    assert calls["run"] == 4 + 2
    assert calls["load_with_adapter"] == 4 + 4 + 2
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("[")]
    grid = [(arm, rate) for arm in ("qlora", "qdora") for rate in (0.001, 0.004)]
    seeds = [(arm, seed) for seed in (0, 1) for arm in ("qlora", "qdora")]
    assert [line.partition(":")[0] for line in lines] == [
        "[1/10] zero-shot",
        "[2/10] longer",
        *(f"[{i}/10] {arm} seed 0, training.learning_rate={rate}" for i, (arm, rate) in enumerate(grid, 3)),
        *(f"[{i}/10] {arm} seed {seed}" for i, (arm, seed) in enumerate(seeds, 7)),
    ]
    report = report_of(folder)
    assert report["arms"].keys() == {"zero-shot", "qlora", "qdora", "longer"}
    assert report["seeds"] == [0, 1]
    assert len(report["arms"]["zero-shot"]["tasks"]["sums"]["by_seed"]) == 1
    assert report["bases"].keys() == {"base"}
    assert [(p["arm"], p["total"], p["chosen"]) for p in report["grid"]] == [
        *(("qlora", 5, True), ("qlora", 5, False), ("qdora", 5, True), ("qdora", 5, False)),
    ]
    chosen = "training.learning_rate=0.001"
    runs = [str(folder / "grid" / "qdora" / f"{chosen}-seed{seed}") for seed in (0, 1)]
    assert report["arms"]["qdora"]["runs"] == runs
    validation = Path(runs[0]) / "evaluation-validation" / "sums.json"
    test = Path(runs[0]) / "evaluation" / "sums.json"
    assert json.loads(test.read_text())["total"] == 4
    manifest = json.loads((Path(runs[0]) / "manifest.json").read_text())
    assert (manifest["data"]["validation"], manifest["data"]["train"]) == (5, 91)
    fingerprint = manifest["data"]["fingerprints"]["validation"]
    assert report["conditions"]["data.fingerprints.validation"] == fingerprint
    assert not (Path(runs[1]) / "evaluation-validation").exists()

    # The same examples by the command for one run; none of them was trained on.
    before, again = json.loads(validation.read_text()), tmp_path / "again"
    one = ["--run", runs[0], "--split", "validation", "--output", str(again)]
    assert run_command("evaluate", one) == 0
    assert {**json.loads((again / "sums.json").read_text()), **_times(before)} == before
    asked, held = (origins(path.with_name("sums.predictions.jsonl")) for path in (test, validation))
    assert len(held) == 5
    assert not held & asked

    state = contents(folder)
    calls.clear()
    capsys.readouterr()
    assert run_command("compare", [*words, "--dry-run"]) == 2
    assert "already holds a comparison" in capsys.readouterr().err
    more = [*words, "--resume", "--set", "seeds=[0,1,2]", "--dry-run"]
    assert run_command("compare", more) == 0
    page = capsys.readouterr().out
    assert "| qdora seed 2 " in page
    tables = (line.split("|") for line in page.splitlines())
    states = {cells[1].strip(): cells[5].strip() for cells in tables if len(cells) == 8}
    # The points are trained, so it is known which were chosen; another seed is left.
    assert [name for name, state in states.items() if state == "new"] == ["qlora seed 2", "qdora seed 2"]
    assert states["qdora seed 0"] == states["qdora seed 1"] == "trained, scored"
    assert "from the steps and answers of qlora, qdora. Without loading" in page
    assert contents(folder) == state
    assert not calls


def _times(scores: dict[str, Any]) -> dict[str, Any]:
    return {key: scores[key] for key in ("seconds", "tokens_per_second")}


@pytest.fixture
def answers(monkeypatch) -> dict[float, str]:
    """Answers by learning rate, in place of those of a model; a rate that is not named answers nothing."""
    by_rate: dict[float, str] = {}

    def evaluate_adapter(config, adapter, context, *, folder, split="test"):
        task = task_for("sums")
        given = by_rate.get(config.training.learning_rate, "") if adapter else ""
        predictions = []
        for i in range(config.data.validation if split == "validation" else 4):
            right = i < len(given) and given[i] == "T"
            verdicts = task.score("1" if right else "2", Example("q", "1", "1", "sums", f"{split}{i}"))
            headline = vars(verdicts[task.scorers[0]])
            rest = {"tokens": 1, "stopped": True, "scorers": verdicts}
            predictions.append(Prediction(f"{split}{i}", "p", "o", **headline, **rest))
        write_scores(summarize(task, predictions, {}, 1.0), folder)
        return []

    monkeypatch.setattr(compare, "evaluate_adapter", evaluate_adapter)
    return by_rate


def test_the_grid_may_grow(tiny_model_folder, tmp_path, calls, answers, capsys):
    """Catches: a point trained again because the grid has another; a seed left at a point that is no longer
    the best; an arm trained at the best point of another arm."""

    def run(*more: str, arms=(QLORA, QDORA), rates=(1e-3, 4e-3), seeds=(0,)) -> dict[str, Any]:
        calls.clear()
        words = write_comparison(
            tmp_path,
            tiny_model_folder,
            arms,
            seeds=[*seeds],
            sweep={"training.learning_rate": [*rates]},
            set=VALIDATION,
            training={"max_steps": 1},
        )
        assert run_command("compare", [*words, *more]) == 0
        return report_of(tmp_path / "comparison")

    answers |= {1e-3: "TF", 4e-3: "TT", 2e-3: "TTT"}
    report = run()
    assert [(p["correct"], p["chosen"]) for p in report["grid"]] == [(1, False), (2, True)] * 2
    assert report["arms"]["qdora"]["tasks"]["sums"]["score"] == 0.5
    assert report["differences"].keys() == {"adapter.dora"}
    assert calls["run"] == 4
    assert run("--resume") == report
    assert not calls["run"]
    own = {"name": "r8", "set": {"adapter.r": 8}, "sweep": {"training.learning_rate": [4e-3, 1e-3, 5e-3]}}
    grown = run("--resume", arms=(QLORA, QDORA, own), rates=(2e-3, 1e-3, 4e-3), seeds=(0, 1))
    assert calls["run"] == 2 + 3 + 3
    assert grown["differences"]["training.learning_rate"] == {"qlora": 2e-3, "qdora": 2e-3, "r8": 4e-3}
    assert [p["settings"]["training.learning_rate"] for p in grown["grid"] if p["chosen"]] == [
        2e-3,
        2e-3,
        4e-3,
    ]
    assert [Path(p).name for p in grown["arms"]["qlora"]["runs"]] == [
        f"training.learning_rate=0.002-seed{seed}" for seed in (0, 1)
    ]
    other = {"data.validation": 6}
    words = write_comparison(tmp_path, tiny_model_folder, (QLORA, QDORA), sweep=RATES, set=other)
    capsys.readouterr()
    assert run_command("compare", [*words, "--resume"]) == 2
    assert "data.validation was 5, is 6" in " ".join(capsys.readouterr().err.split())


def test_a_killed_grid_goes_on_where_it_was(tiny_model_folder, tmp_path, capsys):
    """Catches: a finished point trained again, or one that was cut short taken for a finished one; other
    numbers than those of a comparison that was not interrupted."""

    def write(folder: Path) -> list[str]:
        folder.mkdir()
        training = {"max_steps": 12, "save_every": 2}
        arms = (QLORA, QDORA)
        return write_comparison(
            folder, tiny_model_folder, arms, sweep=RATES, set=VALIDATION, training=training
        )

    whole, cut = write(tmp_path / "whole"), write(tmp_path / "cut")
    assert run_command("compare", whole) == 0
    runs = sorted(path.parent for path in (tmp_path / "whole").rglob("metrics.jsonl"))
    assert len(runs) == 4
    of_cut = [tmp_path / "cut" / run.relative_to(tmp_path / "whole") for run in runs]
    points = tmp_path / "cut" / "comparison" / "grid" / "qlora"
    first, second = (points / f"training.learning_rate={rate}-seed0" for rate in (0.001, 0.004))
    process = start("launch/compare.py", *cut)
    deadline = time.monotonic() + 240
    while not (second / "checkpoints" / "step-2").exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert not (second / "adapter").exists()
    made = (first / "adapter" / "adapter_model.safetensors").stat()
    capsys.readouterr()
    assert run_command("compare", [*cut, "--resume"]) == 0
    said = capsys.readouterr().err
    assert "[1/6] qlora seed 0, training.learning_rate=0.001: validation exact match" in said
    assert said.count(", finished before") == 1
    assert "resuming after step" in said
    assert (first / "adapter" / "adapter_model.safetensors").stat() == made
    for ours, theirs in zip(of_cut, runs, strict=True):
        assert metrics(ours) == metrics(theirs)
    grids = [report_of(tmp_path / name / "comparison")["grid"] for name in ("cut", "whole")]
    assert len(grids[0]) == 4
    for one, other in zip(*grids, strict=True):
        assert {**one, "directory": ""} == {**other, "directory": ""}
