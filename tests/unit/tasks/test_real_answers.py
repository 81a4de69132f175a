"""The scorers on the real data's own solutions; floors are what was measured."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from qdora.tasks import TASKS
from qdora.tasks.scoring import chosen_letter, score_choice, score_normalized

DATA = Path(__file__).parents[3] / ".." / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"real data not found at {DATA}")
pytestmark = needs_data

MATH = ["math_data.json", "AddSub/test.json", "MultiArith/test.json"]


def rows(path: str) -> list[dict[str, Any]]:
    loaded: list[dict[str, Any]] = json.loads((DATA / path).read_text(encoding="utf-8"))
    return loaded


def llm_adapters_correct(output: str, answer: str) -> bool:
    """LLM-Adapters' own numeric rule: last number without commas, within 0.001."""
    found = re.findall(r"-?\d+\.?\d*", output.replace(",", ""))
    return bool(found) and abs(float(found[-1]) - float(answer)) <= 0.001


@pytest.mark.parametrize(("path", "most"), [(MATH[0], 2), (MATH[1], 0), (MATH[2], 0)])
def test_numbers_agree_with_the_data_sets_own_rule(path: str, most: int) -> None:
    """Catches: a normalization that reads real solutions differently from the data set's evaluation."""
    numeric = [row for row in rows(f"math/{path}") if row["answer"] not in "ABCDE"]
    differ = [
        row
        for row in numeric
        if score_normalized(row["output"], row["answer"]).correct
        != llm_adapters_correct(row["output"], row["answer"])
    ]
    assert len(numeric) > 300
    assert len(differ) <= most


@pytest.mark.parametrize(("path", "correct"), [(MATH[0], 2399), (MATH[1], 370), (MATH[2], 560)])
def test_worked_solutions_reach_their_answers(path: str, correct: int) -> None:
    """Catches: answers lost in extraction.  The rest are solutions that are wrong in the data."""
    numeric = [row for row in rows(f"math/{path}") if row["answer"] not in "ABCDE"]
    assert sum(score_normalized(row["output"], row["answer"]).correct for row in numeric) >= correct


def test_letters_are_found() -> None:
    """Catches: the choice missed, or another letter of the solution taken for it."""
    lettered = [row for row in rows("math/math_data.json") if row["answer"] in "ABCDE"]
    stated = [re.findall(r"answer is \(([A-E])\)", row["output"]) for row in lettered]
    found = [chosen_letter(row["output"]) for row in lettered]
    assert sum(map(bool, stated)) >= 195
    assert all(letter == said[-1] for letter, said in zip(found, stated, strict=True) if said)


def test_gsm8k_solutions() -> None:
    """Catches: an answer after #### missed, and last numbers misread where that mark is cut off."""
    lines = (DATA / "math" / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    solutions = [json.loads(line)["answer"] for line in lines]
    parts = [solution.rpartition("####") for solution in solutions]
    golds = [gold.strip() for _, _, gold in parts]
    marked = sum(score_normalized(s, g).correct for s, g in zip(solutions, golds, strict=True))
    unmarked = sum(score_normalized(w, g).correct for (w, _, _), g in zip(parts, golds, strict=True))
    assert marked == len(solutions) == 7473
    assert unmarked >= 7262


@pytest.mark.parametrize("task", ["ARC-Easy", "boolq", "openbookqa"])
def test_commonsense_solutions(task: str) -> None:
    """Catches: answer words that the data's own answers do not use."""
    both = rows(f"commonsense/{task}/train.json") + rows(f"commonsense/{task}/test.json")
    assert all(score_choice(row["output"], row["answer"], TASKS[task].words).correct for row in both)
