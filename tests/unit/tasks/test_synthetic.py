"""The generator: disjoint, distinct, reproducible, short, and right."""

from __future__ import annotations

import re
from fractions import Fraction

import pytest

from qdora.data.rows import normalize
from qdora.errors import InputError
from qdora.tasks.synthetic import KINDS, LARGEST, capacity, generate, solve

EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)\.")


@pytest.fixture(scope="module")
def everything():
    return {split: generate(split, capacity(split), seed=0) for split in ("train", "test")}


def test_splits_are_disjoint_and_distinct(everything):
    """Catches: a test problem trained on, or one problem counted twice."""
    questions = {split: [normalize(e.question) for e in found] for split, found in everything.items()}
    assert not set(questions["train"]) & set(questions["test"])
    for found in questions.values():
        assert len(set(found)) == len(found)


def test_splits_are_disjoint_across_seeds(everything):
    """Catches: a split drawn by the seed, so that another test seed reaches into the training set."""
    trained = {normalize(e.question) for e in everything["train"]}
    other = {normalize(e.question) for e in generate("test", 2_000, seed=1)}
    assert not trained & other


def test_every_solution_is_right(everything):
    """Catches: a wrong equation, a broken chain of steps, a gold answer that is not the last result."""
    for example in everything["train"][:10_000]:
        equations = EQUATION.findall(example.completion)
        steps = " ".join(f"{a} {sign} {b} = {c}." for a, sign, b, c in equations)
        assert example.completion == f"{steps} The answer is {example.answer}."
        for a, sign, b, c in equations:
            left, right = Fraction(int(a)), Fraction(int(b))
            value = {"+": left + right, "-": left - right, "*": left * right, "/": left / right}[sign]
            assert value == int(c)
            assert 1 <= value <= LARGEST
        assert equations[-1][3] == example.answer


def test_every_number_is_needed_and_given(everything):
    """Catches: a distractor number, or a solution with a number that the question does not give."""
    for example in everything["test"][:3_000]:
        asked = sorted(re.findall(r"\d+", example.question))
        results: list[str] = []
        used: list[str] = []
        for a, _, b, c in EQUATION.findall(example.completion):
            pair = [a, b]
            if results:
                pair.remove(results[-1])
            used += pair
            results.append(c)
        assert sorted(used) == asked


def test_questions_are_short_and_filled(everything):
    """Catches: a placeholder left in, a question that grew beyond the size a small model is shown."""
    for example in everything["train"][:10_000]:
        assert len(example.question.split()) <= 28
        assert not re.search(r"[{}]", example.question)
        assert example.question[0].isupper() or example.question[0].isdigit()
        assert example.question.endswith("?")


def test_reproducible_and_extended(everything):
    """Catches: a count that changes the first problems, a process-dependent hash, a seed ignored."""
    some = generate("train", 200, seed=0)
    assert some == everything["train"][:200]
    assert some != generate("train", 200, seed=1)
    # Recorded once: the problems of a published run must not change with a new version.
    assert (
        some[0].question
        == "David shares 24 coins equally among 8 friends. How many coins does each friend get?"
    )


def test_kinds_take_turns():
    """Catches: the kind with the most problems filling the training set."""
    count = 10 * len(KINDS)
    words = [e.completion for e in generate("train", count, seed=5)]
    one_step = sum(len(EQUATION.findall(text)) == 1 for text in words)
    assert one_step == 10 * sum(len(kind.operations) == 1 for kind in KINDS)


def test_names_are_unique_and_kinds_many():
    """Catches: two kinds that share a hash key; fewer kinds than the documentation says."""
    assert len({kind.name for kind in KINDS}) == len(KINDS) >= 8
    assert all(len(kind.phrasings) >= 2 for kind in KINDS)
    assert capacity("train") > 10_000
    assert capacity("test") > 2_000


def test_too_many():
    """Catches: an endless search, or repeated problems, where more are asked for than there are."""
    available = capacity("test")
    with pytest.raises(InputError, match=f"{available + 1} test problems asked for, there are {available}"):
        generate("test", available + 1, seed=0)


def test_unknown_split():
    """Catches: an unknown split that gives no problems."""
    with pytest.raises(InputError, match="did you mean 'train'"):
        generate("trian", 1, seed=0)


@pytest.mark.parametrize(
    ("operations", "numbers", "expected"),
    [
        (("*", "from"), (3, 4, 20), (["3 * 4 = 12.", "20 - 12 = 8."], 8)),
        (("/",), (7, 2), None),
        (("-",), (5, 5), None),
        (("*",), (20, 20), None),
    ],
)
def test_solve(operations, numbers, expected):
    """Catches: a division with a rest, a result of zero or beyond the largest number, change reversed."""
    assert solve(operations, numbers) == expected
