r"""Answer extraction and comparison: pure functions on text.

Numeric tasks have two scorers, both always reported:

`published` is the comparison of the Orca-Math runs of AnswerDotAI/fsdp_qlora
(experiments/orca_math/eval_utils.py and evaluate.ipynb): the last match of "currency
sign, digits, decimals, or a ratio of two such" in the output, and the last one in the
reference *solution*, are equal as strings.  Signs are not seen (-3 is 3), commas cut
(1,000 is 000), `$8` is not `8`, `4.0` is not `4`.  Two departures: there, two texts without
a number are equal, here no answer is wrong; and where a data set has a column for the gold
answer, a solution that reaches another value does not overrule it.

`normalized` compares values.  Outputs and worked solutions are read alike: the answer is, in
this order, the first line `#### N`; the last `answer is N`, `answer: N` or `\boxed{N}`; the
last number.  What follows a new question header, which the model invented, is not read.  A
gold answer that is a letter A-E is matched by the letter chosen.  The value rules are those
of `numbers`.

Choice tasks follow LLM-Adapters (commonsense_evaluate.py): the first occurrence, case
sensitive and also within words, of any of the task's answer words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from qdora.config import AnswerKind
from qdora.errors import InputError, suggest
from qdora.tasks.numbers import Number, find_numbers, plain, same_value


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

    Args:
        output: what the model generated, without the prompt.
        gold: the gold answer; `numeric`: or a worked solution that states it.
        kind: `numeric`, `choice` or `text`.
        words: `choice`: the words looked for in the output.
    Returns: verdicts by the scorer's name, the scorer of the headline score first.
    Raises: InputError: another kind, or output or gold answer are not text.
    """
    if kind not in SCORERS:
        raise InputError(f"kind {kind!r} of answers; {suggest(str(kind), SCORERS)}")
    for name, text in (("output", output), ("gold", gold)):
        if not isinstance(text, str):
            raise InputError(f"{name} {text!r} is a {type(text).__name__}; allowed: text")
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
    letter = _GOLD_LETTER.fullmatch(answer.strip())
    if letter:
        chosen = chosen_letter(output)
        return Verdict(chosen, letter[1].upper(), chosen == letter[1].upper())
    found, gold = stated_number(output), stated_number(answer)
    same = found is not None and gold is not None and same_value(found, gold)
    return Verdict(found.text if found else None, gold.text if gold else None, same)


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
    "numeric": {"normalized": score_normalized, "published": score_published},
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


# A model that does not stop goes on with the next question of its prompt format.
_NEXT_QUESTION = re.compile(
    r"\n[ \t]*#{0,4}[ \t]*(?:question|problem|instruction|q)[ \t]*[0-9]*[ \t]*[:.]", re.IGNORECASE
)
_HASH_LINE = re.compile(r"^[ \t]*####([^\n]{0,80})$", re.MULTILINE)
_MARKER = re.compile(
    r"\\boxed\s*\{"
    r"|\banswer\b[*_\s]*(?:(?:to|for)\b[^.:\n]{0,80}?)?(?:\b(?:is|was|are|equals|(?:would|will) be)\b|[:=])",
    re.IGNORECASE,
)
# Characters read after a marker; without a bound a model that repeats a marker costs quadratic time.
_REACH = 300
_MARKUP = re.compile(r"[\s*_:]*(?:\\[(\[]\s*)?")
_SENTENCE = re.compile(r"[^\n]*?(?:[.!?](?=\s|$|[A-Z*])|(?=\n)|$)")
_UNIT_WORDS = re.compile(r"\s?%?(?:\s[^\W\d]+){0,3}\s?\.?")
_OPERATION = re.compile(r"(?:[+*/×÷]|\s[-x])\s?[$€£(]?[0-9.]")

_GOLD_LETTER = re.compile(r"\(?([A-Ea-e])[).]*")
# A bare A before a word is the article: "the answer is A penny".
_LETTER = re.compile(
    r"(?:(?:option|choice)\s+)?(?:[(\[{]\s*([A-Ea-e])\s*[)\]}]|([B-E])(?!\w)|(A)(?!\w|['’]|\s+[a-z]))",
)
_LONE_LETTER = re.compile(r"\(?([A-E])[).:]*")
_BRACKETED_LETTER = re.compile(r"\(([A-E])\)")


def stated_number(text: str) -> Number | None:
    """The number that a text gives as its answer, or None; see the module's docstring for the order."""
    text = _before_next_question(plain(text))
    return _hash_number(text) or _marked_number(text) or next(reversed(find_numbers(text)), None)


def gold_number(solution: str) -> str | None:
    """The number that a worked solution gives as its answer, read as in an output; None without one."""
    number = stated_number(solution)
    return number.bare if number else None


def chosen_letter(text: str) -> str | None:
    """The letter A-E that a text chooses: after the last marker, alone, or the last one in brackets."""
    text = _before_next_question(text)
    for after in _after_markers(text):
        if letter := _LETTER.match(after):
            return next(group for group in letter.groups() if group).upper()
    alone = _LONE_LETTER.fullmatch(text.strip())
    return alone[1] if alone else next(reversed(_BRACKETED_LETTER.findall(text)), None)


def _before_next_question(text: str) -> str:
    """The text up to the point where the model asks itself the next question."""
    header = _NEXT_QUESTION.search(text)
    return text[: header.start()] if header and text[: header.start()].strip() else text


def _hash_number(text: str) -> Number | None:
    """The first `#### N`; a heading such as `#### Step 1` or `#### 1. Cost` is none."""
    for line in map(str.strip, _HASH_LINE.findall(text)):
        numbers = find_numbers(line)
        if len(numbers) != 1 or not line.startswith(numbers[0].text):
            continue
        if _UNIT_WORDS.fullmatch(line, len(numbers[0].text)):
            return numbers[0]
    return None


def _marked_number(text: str) -> Number | None:
    """The number in the last sentence that states an answer; of `is 5 * 3 = 15 apples` that of the result."""
    for after in _after_markers(text):
        sentence = _SENTENCE.match(after)
        assert sentence is not None  # the pattern ends at the end of the line at the latest
        calculation, _, result = sentence.group().rpartition("=")
        numbers = _OPERATION.search(calculation) and find_numbers(result)
        if numbers := numbers or find_numbers(sentence.group()):
            return numbers[0]
    return None


def _after_markers(text: str) -> Iterator[str]:
    """The text after each answer marker, the last marker first."""
    for marker in reversed(list(_MARKER.finditer(text))):
        yield _MARKUP.sub("", text[marker.end() : marker.end() + _REACH], count=1)
