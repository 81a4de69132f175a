r"""Where a text states its number: gold answers, worked solutions and outputs are read alike.

The answer is, in this order, the first line `#### N`; the last `answer is N`, `answer: N` or `\boxed{N}`;
the last number.  What follows a new question header, which the model invented, is not read.

Two readers share the work.  A number on its own is read by `numbers`.  Of an equation the last side is
read.  Where that is no number, but has an operator, a root or a LaTeX command in it, `expressions` works
it out.  Outside a formula a hyphen between numbers is a range and a slash a fraction or a date: `10-12
eggs` is 10, `$10-12$` is -2.  Of `22/7 ≈ 3.14` the exact side is taken, as math-verify does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from qdora.tasks.expressions import read_expression
from qdora.tasks.numbers import Number, find_numbers, plain, whole_number

# A model that does not stop goes on with the next question of its prompt format.
_NEXT_QUESTION = re.compile(
    r"\n[ \t]*#{0,4}[ \t]*(?:question|problem|instruction|q)[ \t]*[0-9]*[ \t]*[:.]", re.IGNORECASE
)
_HASH_LINE = re.compile(r"^[ \t]*####([^\n]{0,80})$", re.MULTILINE)
TO_WHAT = r"[*_\s]*(?:(?:to|for)\b[^.:\n]{0,80}?)?"
STATES = r"(?:\b(?:is|was|are|equals|(?:would|will|must|should) be)\b|[:=])"
MARKER = re.compile(rf"\\boxed\s*\{{|\banswer\b{TO_WHAT}{STATES}", re.IGNORECASE)
# Markers read, and characters after each: a model that repeats a marker costs quadratic time without bounds.
_MOST_MARKERS = 8
_REACH = 300
_MARKUP = re.compile(r"[\s*_:]*")
_SENTENCE = re.compile(r"[^\n]*?(?:[.!?](?=\s|$|[A-Z*])|(?=\n)|$)")
_UNIT_WORDS = re.compile(r"\s?%?(?:\s[^\W\d]+){0,3}\s?\.?")

# A dollar sign can be money: a formula has no space inside its two, and no digit after the second.
_FORMULA = re.compile(
    r"\$\$([^$]+)\$\$|(?<!\d)\$(?![\s$])([^$\n]*[^$\s])\$(?!\d)|\\\(([^\n]*?)(?:\\\)|$)|\\\[(.*?)(?:\\\]|\Z)",
    re.DOTALL | re.MULTILINE,
)
_RUN = re.compile(
    r"""
    (?:
        \\(?:frac|sqrt|pi|times|cdot|div)(?![a-zA-Z])
      | [$€£]?\ ?[0-9][0-9.,:]*%?
      | (?<!\w)\.[0-9]+
      | [-+*/×÷·⋅^=≈√π(){}⁻⁰¹²³⁴-⁹]
      | \[[0-9]\]
      | (?<=[0-9)}\ ])[xX](?=\ ?[0-9(\\])
      | \ (?=\S)
    )++
    """,
    re.VERBOSE,
)
_HAS_VALUE = re.compile(r"[0-9π]|\\pi")
_UNFINISHED = " .,:-+*/×÷·⋅^=≈("
_CALCULATION = re.compile(
    r"(?:[+*/×÷^]|\\(?:times|cdot|div)|(?<=[0-9])x|\s[-x])\s?[$€£(]?[0-9.\\]|\\frac\s?[0-9{]"
)
_EXPRESSION = re.compile(
    r"(?<=[0-9)}])\s?(?:[+*×÷·⋅^⁻⁰¹²³⁴-⁹]|x(?=\ ?[0-9(\\]))|\\|[√π]|[0-9)/]\(|/\s?-|^\s*-\s?\("
)
# Where such an expression cannot be evaluated, none of its operands is taken for the answer.
_POWER = re.compile(r"[\\^√π⁻⁰¹²³⁴-⁹]|[0-9)]\*\*[0-9(]|\}\s*\{")
_FUNCTION = re.compile(r"\\(?:log|ln|exp|sin|cos|tan|cot|binom|sum|prod|int|lim)\s*_?\s*$")
_STATED = re.compile(r"[=≈^\\√π⁻⁰¹²³⁴-⁹]|[0-9)]\*\*[0-9(]")
_WORTH_READING = re.compile(r"[=+*×÷·⋅^≈\\√π(⁰¹²³⁴-⁹]|[0-9] ?x|/-|\$[^$\n]*\$")


def stated_number(text: str) -> Number | None:
    """The number that a text gives as its answer, or None; see the module's docstring for the order."""
    text = before_next_question(plain(text))
    try:
        return _hash_number(text) or _answer_number(text) or _last_number(text)
    except _NotWorkedOutError:
        return None


def marked_number(text: str) -> Number | None:
    """The number behind a mark of the answer, in plain text without a next question; None without one."""
    try:
        return _hash_number(text) or _answer_number(text)
    except _NotWorkedOutError:
        return None


class _NotWorkedOutError(Exception):
    """What is stated is an expression without a value that can be given; its parts are no answers."""


def before_next_question(text: str) -> str:
    """The text up to the point where the model asks itself the next question."""
    header = _NEXT_QUESTION.search(text)
    return text[: header.start()] if header and text[: header.start()].strip() else text


def after_markers(text: str, marker: re.Pattern[str]) -> Iterator[tuple[str, bool]]:
    """The text after each marker, the last marker first, and whether that is what a box holds."""
    for found in reversed(list(marker.finditer(text))[-_MOST_MARKERS:]):
        after = text[found.end() : found.end() + _REACH]
        boxed = found.group().endswith("{") and (closed := _closing(after)) < len(after)
        yield _MARKUP.sub("", after[:closed] if boxed else after, count=1), boxed


def _closing(text: str) -> int:
    """Where the first bracket closes that was opened before the text; its length where none does."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character in "({") - (character in ")}")
        if depth < 0:
            return i
    return len(text)


def _hash_number(text: str) -> Number | None:
    """The first `#### N`; a heading such as `#### Step 1` or `#### 1. Cost` is none."""
    for line in map(str.strip, _HASH_LINE.findall(text)):
        formula = _FORMULA.fullmatch(line)
        content = _content(formula) if formula else line
        if (run := _RUN.fullmatch(content)) and (number := _value(run.group(), formula is not None)):
            return number
        numbers = find_numbers(line)
        if len(numbers) != 1 or not line.startswith(numbers[0].text):
            continue
        if _UNIT_WORDS.fullmatch(line, len(numbers[0].text)):
            return numbers[0]
    return None


def _answer_number(text: str) -> Number | None:
    """The number in the last sentence that states an answer."""
    for after, boxed in after_markers(text, MARKER):
        sentence = _SENTENCE.match(after)
        assert sentence is not None  # the pattern ends at the end of the line at the latest
        formula = None if boxed else _FORMULA.search(after)
        if formula and formula.start() <= sentence.end() and _is_formula(after, formula):
            number = _number_in(_content(formula), True)
        else:
            number = _number_in(after if boxed else sentence.group(), boxed)
        if number:
            return number
    return None


def _last_number(text: str) -> Number | None:
    """The last number, or the value of the formula or expression that ends in it."""
    last = next(reversed(find_numbers(text)), None)
    end = max(map(text.rfind, (*"0123456789π", "\\pi")))
    cut = max(0, end - _REACH)
    window = text[cut : end + _REACH]
    if end < 0 or not _WORTH_READING.search(window):
        return last
    for formula in _FORMULA.finditer(window):
        if formula.start() <= end - cut < formula.end() and _content(formula):
            return _number_in(_content(formula), True)
    *_, (start, run) = [(0, ""), *_runs(window)]
    # In prose the last number may stand in "a 20 x 15 foot lawn".
    if _STATED.search(run) or run.strip() == text.strip():
        return _value(run, False) or last
    if _FUNCTION.search(window[:start]):
        raise _NotWorkedOutError
    return last


def _is_formula(text: str, formula: re.Match[str]) -> bool:
    r"""Whether a formula gives the first number of a text; that of `$2 \times 3$ = 6` goes on behind it."""
    goes_on = text[formula.end() :].lstrip().startswith("=")
    return not goes_on and not _HAS_VALUE.search(text, 0, formula.start())


def _content(formula: re.Match[str]) -> str:
    content = next(part for part in formula.groups() if part is not None)
    return content.replace("\n", " ").strip()


def _number_in(text: str, formula: bool) -> Number | None:
    """The answer of a sentence or formula: of `5 * 3 = 15 apples` the result, else the first number."""
    calculation, _, result = text.rpartition("=")
    # Not the x of "5 km/h (x = 3)", nor the second of "x = 1, y = 2".
    closed = calculation.count("(") == calculation.count(")")
    if closed and (_CALCULATION.search(calculation) or (formula and "," not in text)):
        return _first_number(result, formula) or _first_number(text, formula)
    return _first_number(text, formula)


def _first_number(text: str, formula: bool) -> Number | None:
    """The first number of a text, or the value of the expression in which it stands."""
    if formula or _WORTH_READING.search(text):
        start, run = next(_runs(text), (0, ""))
        factorial = formula and text.startswith("!", start + len(run))
        if factorial or ("=" not in run and _FUNCTION.search(text[:start])):
            raise _NotWorkedOutError
        if number := _value(run, formula):
            return number
    return next(iter(find_numbers(text)), None)


def _runs(text: str) -> Iterator[tuple[int, str]]:
    """The runs of numbers, operators and brackets in a text, of those that have a number; their positions."""
    for run in _RUN.finditer(text):
        if _HAS_VALUE.search(run.group()):
            # The hyphen of "M-3" is no sign.
            symbolic = run.start() > 0 and text[run.start() - 1].isalpha()
            operators = len(run.group()) - len(run.group().lstrip("+-")) if symbolic else 0
            yield run.start() + operators, run.group()[operators:]


def _value(run: str, formula: bool) -> Number | None:
    """The value of a run: that of its last side."""
    inside, rest = run[: (closed := _closing(run))], run[closed + 1 :]
    # A bracket that was opened before the run: of "C(5, 4) = 5" the side behind it.
    if _HAS_VALUE.search(rest):
        inside = rest if "=" in rest else ""
    side = inside.rstrip(_UNFINISHED).rpartition("=")[2]
    for part in side.split("≈"):
        number = whole_number(part)
        if number is None and (formula or _EXPRESSION.search(part)):
            number = read_expression(part.strip())
        if number:
            return number
    if _POWER.search(run.rpartition("=")[2]):
        raise _NotWorkedOutError
    return None
