"""The letter that a text chooses."""

from __future__ import annotations

import pytest

from qdora.tasks.letters import chosen_letter, lone_letter
from qdora.tasks.scoring import gold_answer, score_normalized

LETTERS = [
    (r"\boxed{\text{B}}", "B"),
    (r"$\boxed{B}$", "B"),
    (r"\boxed{\textbf{(B) } 12}", "B"),
    (r"\[\boxed{\text{A}}\]", "A"),
    (r"\boxed{\mathrm{D}}", "D"),
    ("The correct option is B.", "B"),
    ("So the correct choice is (D).", "D"),
    ("Option B", "B"),
    ("Option (d)", "D"),
    ("B) 12 apples", "B"),
    ("B: 12 apples", "B"),
    ("It costs 3 * 4 = 12.\nB) 12 apples", "B"),
    ("ANSWER: $A$", "A"),
    ("**B**", "B"),
    ("`B`", "B"),
    ("(B)", "B"),
    ("B.", "B"),
    ("b", "B"),
    ("#### B", "B"),
    (r"\textbf{B}", "B"),
    (r"\mathbf{C}", "C"),
    ("Answer: (b)", "B"),
    ("Answer:\n\nB", "B"),
    ("Answer B", "B"),
    ("Ans: C", "C"),
    ("**Answer:** B", "B"),
    ("Answer: A) 5", "A"),
    ("the answer is: b) 4", "B"),
    ('The answer is "B"', "B"),
    (r"The answer is $\text{(B)}$.", "B"),
    (r"The answer is \(B\).", "B"),
    ("The correct answer is option (C)", "C"),
    ("The answer must be C", "C"),
    ("The answer is (B).", "B"),
    ("The answer is B.", "B"),
    ("The answer is (b) 4", "B"),
    ("Answer: **C**", "C"),
    ("The answer is option D, 12 km", "D"),
    ("I choose D", "D"),
    ("I'd go with B.", "B"),
    ("I select option E", "E"),
    ("B is correct.", "B"),
    ("Option C is the correct one, since option A is too small.", "C"),
    ("Option A is wrong. Option B is right.", "B"),
    ("Which option is correct?\nB", "B"),
    ("Both (A) and (C) fit; it must be (C)", "C"),
    ("E", "E"),
    ("(A).", "A"),
    ("The answer is A.", "A"),
    ("The answer is A because 3 < 4.", "A"),
    ("The answer is B and not C", "B"),
    ("The answer is (A).\nQuestion: next?\nThe answer is (E).", "A"),
    ("The answer is A penny.", None),
    ("I choose A number of them", None),
    ("A penny saved", None),
    ("A: Each costs 5.", None),
    ("The answer is B or C.", None),
    ("The answer is (A) and (B)", None),
    ("A) 3\nB) 4\nC) 5", None),
    ("Option A is wrong.", None),
    ("The answer is Bob.", None),
    ("The answer is D-day", None),
    ("The best option is to buy 5.", None),
    ("Alice has B+ grades", None),
    ("E = mc^2", None),
    ("The answer is 450.", None),
    ("Because 5 > 3", None),
    ("", None),
]


@pytest.mark.parametrize(("output", "letter"), LETTERS)
def test_chosen_letter(output: str, letter: str | None) -> None:
    """Catches: a choice in another dress missed; the article A, or two letters, taken for a choice."""
    assert chosen_letter(output) == letter
    for gold in "ABCDE":
        assert score_normalized(output, gold).correct is (gold == letter)


@pytest.mark.parametrize(
    "gold", ["B", "b", "(B)", "B.", "**B**", "$B$", r"\text{B}", r"\textbf{(B)}", "Option B"]
)
def test_a_gold_letter_in_any_dress(gold: str) -> None:
    """Catches: a column of answers whose letters are in markup, so that no output is ever right."""
    assert lone_letter(gold) == "B"
    assert score_normalized("The answer is B.", gold).correct
    assert not score_normalized("The answer is C.", gold).correct


@pytest.mark.parametrize(
    ("solution", "gold"),
    [
        ("3 + 4 = 7, so the answer is (B).", "B"),
        ("7 fits.\nThe correct option is C.", "C"),
        ("The answer is (B) 450.", "450"),
        ("The answer is A penny, which is 0.01.", "0.01"),
        ("(A) is 3 and (B) is 4.", "4"),
    ],
)
def test_the_gold_letter_of_a_solution(solution: str, gold: str) -> None:
    """Catches: a number on the way to a letter used as the gold answer, or a letter instead of a number."""
    assert gold_answer(solution) == gold
    assert score_normalized(solution, solution).correct
