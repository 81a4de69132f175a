"""Scores on disk."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from qdora.data.rows import Example
from qdora.errors import InputError
from qdora.evaluation.scores import Prediction, Scores, read_scores, summarize, write_scores
from qdora.tasks import task_for


@pytest.fixture
def scores() -> Scores:
    task = task_for("math")
    outputs = ["It is 4.", "no idea\u2028\ud800 \n", "1/3"]
    predictions = []
    for index, (output, gold) in enumerate(zip(outputs, ["4.0", "", "0.33"], strict=True)):
        verdicts = task.score(output, Example("", "", gold, "math", ""))
        head = verdicts["normalized"]
        prompt, origin = f"Q{index}", f"f.json:{index}"
        shown = (head.extracted, head.gold, head.correct)
        predictions.append(Prediction(origin, prompt, output, *shown, 5, index != 1, verdicts))
    return summarize(task, predictions, {"method": "greedy", "eos_token_ids": [2]}, seconds=3.0)


def test_round_trip(scores: Scores, tmp_path: Path) -> None:
    """Catches: fields lost or changed on the way, line breaks in outputs that split a prediction."""
    path = write_scores(scores, tmp_path / "evaluation")
    assert path == tmp_path / "evaluation" / "math.json"
    assert read_scores(path) == scores


def test_a_report_of_earlier_rules_is_read_and_known(scores: Scores, tmp_path: Path) -> None:
    """Catches: figures of other rules of reading answers taken for today's, or their files refused."""
    path = write_scores(scores, tmp_path)
    tree = json.loads(path.read_text())
    assert tree.pop("rules") == scores.rules == 3
    path.write_text(json.dumps(tree))
    assert read_scores(path) == replace(scores, rules=1)


def test_contract_of_the_files(scores: Scores, tmp_path: Path) -> None:
    """Catches: a key that scripts rely on renamed, or a scorer left out of the report."""
    tree = json.loads(write_scores(scores, tmp_path).read_text())
    assert {"task", "metric", "score", "correct", "total", "stderr", "scorer", "decoding"} <= set(tree)
    assert (tree["score"], tree["correct"], tree["total"]) == (2 / 3, 2, 3)
    assert set(tree["per_scorer"]) == {"normalized", "published", "math_verify"}
    assert tree["tokens_per_second"] == 5
    lines = [json.loads(line) for line in (tmp_path / "math.predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    assert {"origin", "prompt", "output", "extracted", "gold", "correct", "scorers"} <= set(lines[0])


@pytest.mark.parametrize("name", ["org/data", "../../escape", "a b", "x" * 300])
def test_a_task_name_cannot_leave_the_directory(name: str, scores: Scores, tmp_path: Path) -> None:
    """Catches: a hub dataset's slash, or dots, writing somewhere else; a raw OSError for a long name."""
    inside = tmp_path / "evaluation"
    if len(name) > 200:
        with pytest.raises(InputError, match="cannot be written"):
            write_scores(replace(scores, task=name), inside)
    else:
        path = write_scores(replace(scores, task=name), inside)
        assert path.parent == inside
        assert read_scores(path).task == name
    assert [p.name for p in tmp_path.iterdir()] == ["evaluation"]


def test_a_full_disk_leaves_the_old_report(
    scores: Scores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: a half-written report, new predictions beside old scores, temporary files left behind."""
    write_scores(scores, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    synced: list[int] = []

    def full(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"math\.json: scores cannot be written: .*No space"):
        write_scores(replace(scores, seconds=9.0), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_reports_are_replaced_not_rewritten(scores: Scores, tmp_path: Path) -> None:
    """Catches: writing in place, where a killed process leaves half a report."""
    path = write_scores(scores, tmp_path)
    before = path.read_text()
    with path.open() as held:
        write_scores(replace(scores, seconds=9.0), tmp_path)
        assert held.read() == before
    assert read_scores(path).seconds == 9


def test_a_file_in_the_way(scores: Scores, tmp_path: Path) -> None:
    """Catches: a traceback where the directory cannot be made."""
    (tmp_path / "evaluation").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_scores(scores, tmp_path / "evaluation")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("math.json", "{", r"math\.json: not valid JSON"),
        ("math.json", "[]", "expected a JSON object"),
        ("math.json", "{}", "not a score file"),
        ("math.predictions.jsonl", "{}\n", r"jsonl:1: not a prediction"),
        ("math.predictions.jsonl", "", "3 questions"),
        ("math.predictions.jsonl", None, "cannot be read"),
    ],
)
def test_damaged_reports(file: str, text: str | None, message: str, scores: Scores, tmp_path: Path) -> None:
    """Catches: a truncated report compared as if it were whole, errors that name no file."""
    path = write_scores(scores, tmp_path)
    if text is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_text(text)
    with pytest.raises(InputError, match=message):
        read_scores(path)
