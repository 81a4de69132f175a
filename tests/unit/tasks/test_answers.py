"""Extraction and comparison on outputs as models write them."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qdora
from qdora.config import AnswerKind
from qdora.data.rows import Example
from qdora.errors import InputError
from qdora.tasks import TASKS, task_for
from qdora.tasks.answers import stated_number
from qdora.tasks.base import Task
from qdora.tasks.letters import chosen_letter
from qdora.tasks.scoring import (
    SCORERS,
    Verdict,
    gold_answer,
    last_number_string,
    score_answer,
    score_choice,
    score_normalized,
    score_published,
    score_text,
)


def score_output(task: Task, output: str, *, answer: str, completion: str) -> dict[str, Verdict]:
    return task.score(output, Example("q", completion, answer, task.name, "t:1"))


STATED = [
    ("The answer is 4.", "4"),
    ("She pays $1,234.50 in total.", "$1,234.50"),
    ("so it fell to -3", "-3"),
    ("16 - 12 = 4 kids. The answer is 4.", "4"),
    ("First 3 + 4 = 7, then 7 * 2 = 14.\n#### 14", "14"),
    ("#### 1. Cost\nIt costs 3 each.\n#### Step 2\n5 * 3 = 15", "15"),
    ("#### 12 apples\nThat took 5 steps.", "12"),
    ("The answer is 4. That means 2 for each of the 2 kids.", "4"),
    ("The answer is 5. Wait, no. The answer is 6.", "6"),
    ("The answer is 4.\n\n###Question:\nTom has 9 pens.\n###Answer:\nThe answer is 9.", "4"),
    ("The answer is 4.\nQ: Ann has 7.\nA: The answer is 7.", "4"),
    ("The answer is 3 * 5 = 15 ounces.", "15"),
    ("The answer is 6 pieces, or 6 * 2.5 = 15 ounces.", "15"),
    ("The answer is $8 (= 5 + 3).", "$8"),
    ("The answer is 5 km/h (v = 3).", "5"),
    ("**Answer:** $4,000", "$4,000"),
    ("Answer: 3/4 cup", "3/4"),
    ("The final answer is:\n\n\\[ \\boxed{42} \\]", "42"),
    ("So \\boxed{\\frac{1}{2}} of the 8 cakes.", "1/2"),
    ("The answer to the question is 17", "17"),
    ("The answer is unknown, but there are 5 cats.", "5"),
    ("The answer is approximately 3.14.", "3.14"),
    ("12.", "12"),
    ("He arrived on March 5, 2021", "2021"),
    ("I do not know.", None),
    ("", None),
]


@pytest.mark.parametrize(("output", "text"), STATED)
def test_stated_number(output: str, text: str | None) -> None:
    """Catches: an invented next question, a heading or a calculation's first term taken for the answer."""
    number = stated_number(output)
    assert (number.text if number else None) == text


NORMALIZED = [
    ("The answer is 4.", "4.0", True),
    ("The answer is 4.", "4", True),
    ("The answer is 5.", "4.0", False),
    ("She has $1,234.50 left.", "1234.5", True),
    ("it is -3 degrees", "-3.0", True),
    ("it is 3 degrees", "-3.0", False),
    ("1,000", "1000", True),
    ("50%", "50", True),
    ("1 1/2", "1.5", True),
    ("3/4 cup", "0.75", True),
    ("1/3", "0.33", True),
    ("12 apples", "12", True),
    ("The answer is (B).", "B", True),
    ("The answer is (B).", "C", False),
    ("The answer is 450.", "B", False),
    ("The answer is (B) 450.", "450", True),
    ("no idea", "4", False),
    ("no idea", "", False),
    ("", "", False),
    ("7", "", False),
    ("four", "four", False),
]


@pytest.mark.parametrize(("output", "answer", "correct"), NORMALIZED)
def test_normalized(output: str, answer: str, correct: bool) -> None:
    """Catches: form counted as a wrong answer, or two missing answers counted as a match."""
    assert score_normalized(output, answer).correct is correct


PUBLISHED_STRINGS = [
    ("He pays $8.", "$8"),
    ("He pays $8.50.", "$8.50"),
    ("-3", "3"),
    ("1,000", "000"),
    ("ratio 3:2", "3:2"),
    ("3/4", "4"),
    ("50%", "50"),
    ("none", None),
]


@pytest.mark.parametrize(("text", "expected"), PUBLISHED_STRINGS)
def test_published_number_strings(text: str, expected: str | None) -> None:
    """Catches: an improved rule under the published name, which no longer reproduces those figures."""
    assert last_number_string(text) == expected


def test_published_compares_strings() -> None:
    """Catches: `published` comparing values."""
    assert score_published("It is 8", "so 8.").correct
    assert not score_published("It is $8", "so 8.").correct
    assert not score_published("It is 8.0", "so 8.").correct


def test_two_missing_answers_never_match() -> None:
    """Catches: None == None counted as correct, as in the published code."""
    assert not score_published("no idea", "none").correct
    assert not score_choice("no idea", "", ("true", "false")).correct
    assert not score_choice("", "", ()).correct
    assert not score_text("  ", "\n").correct


def test_orca_gold_is_read_from_the_solution() -> None:
    """Catches: the published cut of 1,200, which is 200, used as the gold value of `normalized`."""
    verdicts = score_output(
        TASKS["orca_math"], "It costs 1200.", answer="200", completion="Therefore it costs $1,200."
    )
    assert verdicts["normalized"].correct
    assert verdicts["published"].gold == "200"
    assert not verdicts["published"].correct


def test_answer_column_overrules_the_solution() -> None:
    """Catches: a wrong worked solution (a fifth of math_data.json) used as gold by `published`."""
    task = task_for("math_data")

    def correct(output: str, answer: str, completion: str) -> bool:
        return score_output(task, output, answer=answer, completion=completion)["published"].correct

    assert correct("The answer is 4.", "4.0", "16 - 12 = 4. The answer is 4.")
    assert not correct("The answer is 5.", "4.0", "The answer is 5.")
    assert not correct("It is 450. The answer is (C).", "B", "It is 450. The answer is (B).")


CHOICES = [
    ("the correct answer is answer2", "answer2", "ARC-Easy", True),
    ("answer3 because answer2 is wrong", "answer2", "ARC-Easy", False),
    ("the correct answer is answer5", "answer5", "ARC-Challenge", True),
    ("Answer2", "answer2", "openbookqa", False),
    ("the correct answer is true", "true", "boolq", True),
    ("that is untrue, so false", "false", "boolq", False),
    ("solution2", "solution2", "piqa", True),
    ("ending4", "ending4", "hellaswag", True),
    ("option1", "option1", "winogrande", True),
    ("answer1", "answer1", "social_i_qa", True),
    ("option1", "answer1", "social_i_qa", False),
]


@pytest.mark.parametrize(("output", "answer", "name", "correct"), CHOICES)
def test_choice_as_published(output: str, answer: str, name: str, correct: bool) -> None:
    """Catches: last match, other case or whole words instead of the published first match."""
    verdicts = score_output(TASKS[name], output, answer=answer, completion="")
    assert verdicts["first_answer_word"].correct is correct


def test_text_compares_first_lines() -> None:
    """Catches: case, blank lines or an explanation after the answer counted as wrong."""
    assert score_text("\n  Paris \nbecause it is the capital", "paris").correct
    assert not score_text("Paris, France", "Paris").correct


@pytest.mark.parametrize("kind", SCORERS)
@settings(deadline=None)  # the first expression imports sympy
@given(output=st.text(max_size=80), answer=st.sampled_from(["", "3", "B", "true"]))
def test_every_kind_reports_its_scorers(kind: str, output: str, answer: str) -> None:
    """Catches: a scorer missing from the report, and a verdict of correct without two answers."""
    verdicts = score_output(task_for("mine", kind), output, answer=answer, completion="")  # type: ignore[arg-type]
    assert tuple(verdicts) == tuple(SCORERS[kind])  # type: ignore[index]
    for verdict in verdicts.values():
        assert not verdict.correct or (verdict.extracted is not None and verdict.gold is not None)


@pytest.mark.parametrize(
    "loop",
    [
        "the answer is ",
        "answer is 1 + ",
        "\n# ",
        "#### ",
        "1,000,",
        "1/",
        "answer is 5 = ",
        "\\frac{1",
        "\n    ",
        "answer is $",
        "answer is \\sqrt{-2} ",
        "\\boxed{\\sqrt{",
        "\\[ 1 ",
        "1 = ",
        "((1)",
        "9^",
        "9**",
        "Option B ",
        "A) ",
        "\\text{B} ",
    ],
)
def test_a_looping_model_costs_no_time(loop: str) -> None:
    """Catches: extraction that takes quadratic time on an output that repeats itself."""
    text = loop * 3000
    started = time.process_time()
    stated_number(text)
    chosen_letter(text)
    last_number_string(text)
    assert time.process_time() - started < 3


@pytest.mark.parametrize(
    ("output", "gold", "correct"),
    [
        ("The answer is 4.", "4.0", True),
        ("so 3/4", "The answer is 3/4", True),
        ("so 4", "The answer is 3/4", False),
        ("it is -3", "The answer is \u22123.", True),
        ("it is 3", "The answer is \u22123.", False),
        ("7.5 hours", "7 1/2", True),
        ("3:2", "ratio 3:2", True),
        ("The answer is (B).", "B", True),
        ("it is 1000", "1e3", True),
        ("it is 3", "1e3", False),
        ("it is -1/2", r"The answer is $-\frac{1}{2}$.", True),
        ("it is 1/2", r"The answer is $-\frac{1}{2}$.", False),
        ("The answer is 15", "The answer is 20-5=15.", True),
        ("The answer is 20", "The answer is 20-5=15.", False),
        (r"$4 \times 5 = 20$", "4x5=20", True),
        ("It is 4", "4x5=20", False),
        ("It is 7250", r"7\ 250", True),
        (r"The answer is $\frac{1}{\sqrt{2}}$.", r"\frac{\sqrt{2}}{2}", True),
        ("The answer is 1.41.", r"\sqrt{2}", True),
        ("The answer is 1.4.", r"\sqrt{2}", False),
        ("The answer is 2.", r"\sqrt{2}", False),
        ("The answer is 6.28.", r"2\pi", True),
        ("The answer is 2.", r"2\pi", False),
        (r"The answer is \(\frac{355}{113}\).", r"\pi", False),
        ("The answer is 9.", "9^{9^{9^{9}}}", False),
    ],
)
def test_gold_and_output_are_read_alike(output: str, gold: str, correct: bool) -> None:
    """Catches: a second grammar for gold answers."""
    assert score_answer(output, gold)["normalized"].correct is correct


@settings(deadline=None)  # the first expression imports sympy
@given(st.text(alphabet="0123456789.,:/-+ $%e^x½()=*√π\nthe answer is#", max_size=40))
def test_the_gold_number_of_a_text_is_its_answer(text: str) -> None:
    """Catches: a gold answer whose value changes where it is cut out of its solution."""
    gold = gold_answer(text)
    stated = stated_number(text)
    assert gold is not None if stated else gold in (None, *"ABCDE")
    if gold is not None:
        assert score_normalized(text, gold).correct, (text, gold)
        assert not set(gold) & set("$,")


def test_score_answer_by_kind() -> None:
    """Catches: the headline scorer behind another one, answer words ignored, verdicts on case."""
    assert list(score_answer("It is 8", "8")) == ["normalized", "published", "math_verify"]
    both = score_answer("It is $8", "8")
    assert [verdict.correct for verdict in both.values()] == [True, False, True]
    assert score_answer("it is true", "true", kind="choice", words=["true", "false"]) == {
        "first_answer_word": Verdict("true", "true", True)
    }
    assert score_answer(" paris\nin France", "Paris", kind="text")["first_line"].correct


def test_score_answer_refuses_what_it_cannot_compare() -> None:
    """Catches: a KeyError or AttributeError from inside a scorer."""
    with pytest.raises(InputError, match=r"kind 'number' of answers; did you mean 'numeric'\?"):
        score_answer("1", "1", kind="number")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"kind \['numeric'\] of answers; did you mean 'numeric'\?"):
        score_answer("1", "1", kind=["numeric"])  # type: ignore[arg-type]
    with pytest.raises(InputError, match="gold 4 is a int; allowed: text"):
        score_answer("4", 4)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "gold", "words", "message"),
    [
        ("choice", "true", (), "kind 'choice' needs words"),
        ("choice", "true", "true false", "words 'true false' is a str; allowed: a list such as"),
        ("choice", "true", None, "words None is a NoneType; allowed: a list"),
        ("choice", "true", ["true", ""], "words: '' is none; allowed: text of at least one character"),
        ("choice", "true", ["true", 1], "words: 1 is none; allowed: text"),
        ("choice", "True", ["true", "false"], "gold 'True' is none of the words; did you mean 'true'"),
        ("numeric", "4", ["4", "5"], r"words \['4', '5'\] belong to kind 'choice', not to 'numeric'"),
        ("text", "x", ("x",), r"words \['x'\] belong to kind 'choice', not to 'text'"),
    ],
)
def test_score_answer_refuses_words_that_do_nothing(
    kind: AnswerKind, gold: str, words: Any, message: str
) -> None:
    """Catches: every letter of a string looked for, words ignored, a gold answer that no output can reach."""
    with pytest.raises(InputError, match=message):
        score_answer("it is true", gold, kind=kind, words=words)


def test_the_readme_scores_as_it_says() -> None:
    """Catches: an example that a reader copies and that does something else."""
    readme = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    (block,) = (code for code in blocks if "score_answer" in code)
    assert "from qdora import score_answer\n" in block
    claims = re.findall(r"^(score_answer\(.*)  # (True|False)$", block, re.MULTILINE)
    assert len(claims) == 3
    for call, claimed in claims:
        names = {"score_answer": qdora.score_answer, "words": ["true", "false"]}
        assert str(eval(call, names)) == claimed, call


def test_known_tasks_keep_their_kind() -> None:
    """Catches: boolq scored as numbers because the configuration's default kind is numeric."""
    assert task_for("boolq", "numeric").kind == "choice"
    assert task_for("my_file", "text").kind == "text"
    for source in ("file", "hub", "commonsense"):  # a file of that name
        assert task_for(source, "text").kind == "text"
