"""Test questions that stand in the training set."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

from qdora.data.example import Example

_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
# Everything but word characters and what carries meaning in a formula: operators, a sign or minus
# before a digit, a decimal point.
_PUNCTUATION = re.compile(r"(?!(?<=\d)\.\d)(?!-\s*\d)[^\w+*/=<>^%]|_")


def remove_leaked(train: Iterable[Example], test: Iterable[Example]) -> tuple[list[Example], int]:
    """The training examples whose question is not a test question, and how many were removed.

    Questions are compared as a whole (for the commonsense tasks: the instruction with its answer
    choices) after `normalize`.  That catches copies which differ in case, spacing, punctuation or
    Unicode form.  It does not catch a paraphrase, other numbers or names in the same story, the
    same question with other or reordered choices, or a test question inside a longer text.  A
    training question that stands there several times is removed, and counted, each time.
    """
    questions = {normalize(example.question) for example in test}
    train = list(train)
    kept = [example for example in train if normalize(example.question) not in questions]
    return kept, len(train) - len(kept)


def normalize(question: str) -> str:
    """Case, Unicode form (NFKC), spacing and punctuation made alike; numbers and operators kept.

    Without the operators `5 - 3` and `5 + 3`, or `2.5` and `25`, would be the same question.
    """
    text = unicodedata.normalize("NFKC", question).casefold()
    return " ".join(_PUNCTUATION.sub(" ", _THOUSANDS.sub("", text)).split())
