r"""Comparison of answers: pure functions on text.

Numeric tasks have three scorers, all always reported:

`published` is the comparison of the Orca-Math runs of AnswerDotAI/fsdp_qlora
(experiments/orca_math/eval_utils.py and evaluate.ipynb): the last match of "currency
sign, digits, decimals, or a ratio of two such" in the output, and the last one in the
reference *solution*, are equal as strings.  Signs are not seen (-3 is 3), commas cut
(1,000 is 000), `$8` is not `8`, `4.0` is not `4`.  Two departures: there, two texts without
a number are equal, here no answer is wrong; and where a data set has a column for the gold
answer, a solution that reaches another value does not overrule it.

`normalized` compares values.  Gold answers, worked solutions and outputs are read by the one grammar of
`answers`, `numbers` and `expressions`.  A gold answer that is a letter A-E is matched by the chosen
letter, see `letters`.

`math_verify` is math-verify's own reading of both, and its own comparison, as others use it.  What follows a
new question is left out before, and letters are those of `normalized`.

Choice tasks follow LLM-Adapters (commonsense_evaluate.py): the first occurrence, case
sensitive and also within words, of any of the task's answer words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from qdora.config import AnswerKind
from qdora.errors import InputError, suggest
from qdora.tasks.answers import before_next_question, marked_number, stated_number
from qdora.tasks.letters import chosen_letter, lone_letter, marked_letter
from qdora.tasks.math_verifier import compare
from qdora.tasks.numbers import plain, same_value

RULES = 3
"""Version of the rules by which answers are read: figures of two versions are not comparable."""


@dataclass(frozen=True)
class Verdict:
    """The verdict of one scorer on one output.

    Attributes:
        extracted: the answer found in the output, as written there; None where there is none.
        gold: the gold answer that it was compared with; None where there is no usable one.
        correct: False whenever either is None.
    """

    extracted: str | None
    gold: str | None
    correct: bool


def score_answer(
    output: str, gold: str, *, kind: AnswerKind = "numeric", words: Sequence[str] = ()
) -> dict[str, Verdict]:
    """Compare a model's output with a gold answer, by every scorer of its kind.

        verdicts = score_answer("So each gets $7 \\frac{1}{2}$.", "7.5")
        verdicts["normalized"].correct  # True

    Args:
        output: what the model generated, without the prompt.
        gold: the gold answer; `numeric`: a number or a letter A-E, or a worked solution that states it.
        kind: `numeric`, `choice` or `text`.
        words: `choice`: the words looked for in the output, one of them the gold answer.
    Returns: verdicts by the scorer's name, the scorer of the headline score first.
    Raises: InputError: another kind; output, gold answer or a word are not text; `choice` without words, or
        with a gold answer that is none of them; words with another kind.
    """
    if not isinstance(kind, str) or kind not in SCORERS:
        raise InputError(f"kind {kind!r} of answers; {suggest(str(kind), SCORERS)}")
    for name, text in (("output", output), ("gold", gold)):
        if not isinstance(text, str):
            raise InputError(f"{name} {text!r} is a {type(text).__name__}; allowed: text")
    _check_words(words, kind, gold)
    return verdicts_of(output, gold, kind, words)


def _check_words(words: Sequence[str], kind: AnswerKind, gold: str) -> None:
    if isinstance(words, str) or not isinstance(words, Sequence):
        raise InputError(
            f'words {words!r} is a {type(words).__name__}; allowed: a list such as ["true", "false"]'
        )
    if kind != "choice":
        if words:
            raise InputError(f"words {list(words)!r} belong to kind 'choice', not to {kind!r}")
        return
    if bad := [word for word in words if not isinstance(word, str) or not word]:
        raise InputError(f"words: {bad[0]!r} is none; allowed: text of at least one character")
    if not words:
        raise InputError("kind 'choice' needs words, the answers that are looked for in an output")
    if gold not in words:
        raise InputError(f"gold {gold!r} is none of the words; {suggest(gold, words)}")


def verdicts_of(output: str, gold: str, kind: AnswerKind, words: Sequence[str]) -> dict[str, Verdict]:
    """`score_answer` without its checks."""
    arguments = (output, gold, words) if kind == "choice" else (output, gold)
    return {name: scorer(*arguments) for name, scorer in SCORERS[kind].items()}


def score_published(output: str, reference: str) -> Verdict:
    """The string comparison of the Orca-Math runs; see the module's docstring.

    Args:
        reference: text whose last number string is the gold one.
    Source: AnswerDotAI/fsdp_qlora, experiments/orca_math/eval_utils.py `extract_last_number_or_ratio`.
    """
    extracted, gold = last_number_string(output), last_number_string(reference)
    return Verdict(extracted, gold, gold is not None and extracted == gold)


def score_normalized(output: str, answer: str) -> Verdict:
    """Comparison by value, or by chosen letter where the gold answer is a letter A-E.

    Args:
        answer: the gold answer, or a worked solution that states it.
    """
    if letter := _gold_letter(answer):
        chosen = chosen_letter(output)
        return Verdict(chosen, letter, chosen == letter)
    found, gold = stated_number(output), stated_number(answer)
    same = found is not None and gold is not None and same_value(found, gold)
    return Verdict(found.text if found else None, gold.text if gold else None, same)


def score_math_verify(output: str, answer: str) -> Verdict:
    """math-verify's comparison; by chosen letter where the gold answer is a letter A-E.

    Args:
        answer: the gold answer, or a worked solution that states it.
    Raises: RuntimeError: math-verify's process cannot be started.
    """
    if _gold_letter(answer) or not answer.strip():
        return score_normalized(output, answer)
    return Verdict(*compare(before_next_question(output), before_next_question(answer)))


def score_choice(output: str, answer: str, words: Sequence[str]) -> Verdict:
    """First of the answer words in the output, equal to the gold answer.

    Source: AGI-Edgerunners/LLM-Adapters, commonsense_evaluate.py `extract_answer`.
    """
    first = re.search("|".join(map(re.escape, words)), output) if words else None
    extracted = first.group() if first else None
    return Verdict(extracted, answer or None, bool(answer) and extracted == answer)


def score_text(output: str, answer: str) -> Verdict:
    """Equality of the first lines, apart from case and surrounding space."""
    lines = [text.strip().splitlines() for text in (output, answer)]
    extracted, gold = (found[0].strip() if found else None for found in lines)
    same = extracted is not None and gold is not None and extracted.casefold() == gold.casefold()
    return Verdict(extracted, gold, same)


SCORERS: Mapping[AnswerKind, Mapping[str, Callable[..., Verdict]]] = {
    "numeric": {
        "normalized": score_normalized,
        "published": score_published,
        "math_verify": score_math_verify,
    },
    "choice": {"first_answer_word": score_choice},
    "text": {"first_line": score_text},
}
"""Scorers by kind of answer; the first gives the headline score."""

_PUBLISHED_DIGITS = r"\d+(?:\.\d+)?"
_PUBLISHED_NUMBER = re.compile(rf"[$€£]?{_PUBLISHED_DIGITS}(?::{_PUBLISHED_DIGITS})?")


def last_number_string(text: str) -> str | None:
    """The last number or ratio as the Orca-Math runs cut it out, or None."""
    return next(reversed(_PUBLISHED_NUMBER.findall(text)), None)


def published_gold(answer: str, solution: str) -> str:
    """The gold answer as `published` compares it: spelled as in the solution, where that comes to its value.

    A letter has no number string, so that equal last numbers of two solutions never count as the choice.
    """
    in_solution = last_number_string(solution)
    return in_solution if in_solution and score_normalized(in_solution, answer).correct else answer


def gold_answer(solution: str) -> str | None:
    """The number or letter that a worked solution states, read as in an output; None without one."""
    number = None if (letter := _gold_letter(solution)) else stated_number(solution)
    return letter or (number.bare if number else None)


def _gold_letter(answer: str) -> str | None:
    """The letter that a gold answer is, or that a worked solution marks as its answer instead of a number."""
    if letter := lone_letter(answer):
        return letter
    text = before_next_question(plain(answer))
    return None if marked_number(text) else marked_letter(text) or None
