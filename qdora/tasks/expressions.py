r"""Values of expressions: LaTeX, sums, products, powers, roots, π; math-verify reads them.

math-verify limits its time by SIGALRM, which works in the main thread alone and would interrupt a
training run.  So it runs without, and what it gets is bounded instead: a looping model writes anything.
Only digits, brackets, operators and six macros are passed on, no more than 100 characters and four levels
of brackets; exponents are literals of up to three digits.  math-verify leaves a power as it stands;
it is worked out here where the result is small.

Where its reading differs from what people mean, the expression is spelled out before: thousands commas go,
decimals are passed as symbols (it makes floats of them), `5(3)` gets a product sign (it reads 8), and two
numbers side by side are refused (`7\ 250` is 257 to it).  `7\frac{1}{2}` is 15/2 to both.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from fractions import Fraction
from functools import lru_cache
from typing import Any

from qdora.tasks.numbers import Number, plain

_LONGEST = 100
_DEEPEST = 4
_LARGEST_EXPONENT = 1_000
_MOST_BITS = 1_024

_IRRATIONAL_PLACES = 40
_LARGEST_IRRATIONAL = 10**15

_RAISED = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
_SPELLINGS = tuple(
    (re.compile(pattern), meaning)
    for pattern, meaning in (
        (r"[$€£]\s?", ""),
        (r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", ""),
        (r"×|(?<=[0-9)}])\s?[xX]\s?(?=[-0-9(\\])", r"\\times "),
        (r"[·⋅]", r"\\cdot "),
        (r"÷", r"\\div "),
        (r"π", r"\\pi "),
        (r"[⁻⁰¹²³⁴-⁹]+", lambda match: f"^{{{match.group().translate(_RAISED)}}}"),
        (r"√\s?([0-9]+)|√\s?\(([^()]*)\)", r"\\sqrt{\1\2}"),
        (r"(?<=[0-9)}])\*\*", "^"),
        (r"\\frac\s*([0-9])\s*([0-9])", r"\\frac{\1}{\2}"),
        (r"\\sqrt\s*([0-9])(?![0-9])", r"\\sqrt{\1}"),
        (r"\^\s*([-+]?[0-9]+|\\frac\{[0-9]+\}\{[0-9]+\})", r"^{\1}"),
        (r"\^\s*\(([^()]*)\)", r"^{\1}"),
        # "8 (= 5 + 3)" and "5 (3 red)" explain, "10 (√3 + 1)" is a product.
        (r"(?<=[0-9])\s+\((?=[0-9]*\s*\\(?:sqrt|pi))", "("),
        (r"(?<=[0-9)}])\(|\)(?=[0-9\\])", lambda match: r"\cdot (" if match.group() == "(" else r")\cdot "),
    )
)
_ALLOWED = re.compile(r"(?:\\(?:frac|times|cdot|div|pi)(?![a-zA-Z])|\\sqrt(?:\[[0-9]\])?|[-0-9.+*/^(){} ])+")
_AMBIGUOUS = re.compile(
    r"[0-9]\s+[0-9(]|[)}]\s*[0-9]|\\pi\s*[0-9(]|[)}]\s+\(|\^\s*\{(?:[^{}]|\{[^{}]*\})*\}\s*\^|[0-9]{31}"
    r"|(?:/|\\div)\s*[0-9.]+\s*\\(?:pi|sqrt)"  # 1/2π
)
_NEXT_ARGUMENT = re.compile(r"\}\s*\{")
_EXPONENT = re.compile(
    r"\^\s*\{\s*[-+]?(?:([0-9]{1,3})(?:\s*/\s*[0-9]{1,2})?|\\frac\{([0-9]{1,3})\}\{[0-9]{1,2}\})\s*\}"
)
_DECIMAL = re.compile(r"[0-9]*\.[0-9]+")
# Not d, e, i, o or x, which mean something to math-verify.
_SYMBOLS = "abcfghkmn"


@lru_cache(maxsize=1024)
def read_expression(text: str) -> Number | None:
    """The value of an expression; None where the text is none, or is out of bounds.

    The number's text is a rational value, or the irrational expression as written, whose value has 40 places.
    """
    values: dict[str, Fraction] = {}
    spelled = _spelled(text, values)
    if spelled is None:
        return None
    found = _parse(spelled)
    try:
        value = _value(found[0], values) if len(found) == 1 else None
    except (ArithmeticError, ValueError):
        return None
    return None if value is None else _number(text, value)


def _spelled(text: str, values: dict[str, Fraction]) -> str | None:
    """The expression as math-verify is to read it, or None; fills the values of the symbols in it."""
    if len(text) > _LONGEST:
        return None
    text = plain(text).strip()
    for pattern, meaning in _SPELLINGS:
        text = pattern.sub(meaning, text)
    depths = list(_depths(text))
    if not _ALLOWED.fullmatch(text) or _AMBIGUOUS.search(text) or min(depths) < 0 or depths[-1] != 0:
        return None
    if text.count("\\frac") != len(_NEXT_ARGUMENT.findall(text)):
        return None
    exponents = [int(literal or above) for literal, above in _EXPONENT.findall(text)]
    largest = 1
    for exponent in exponents:
        largest *= max(exponent, 1)
    if max(depths) > _DEEPEST or len(exponents) != text.count("^") or largest > _LARGEST_EXPONENT:
        return None
    decimals = _DECIMAL.findall(text)
    if len(decimals) > len(_SYMBOLS):
        return None
    values.update(zip(_SYMBOLS, (Fraction("0" + decimal) for decimal in decimals), strict=False))
    symbols = iter(_SYMBOLS)
    return _DECIMAL.sub(lambda _: f" {next(symbols)} ", text)


def _depths(text: str) -> Iterator[int]:
    """How many brackets are open after each character."""
    depth = 0
    for character in text:
        depth += (character in "({") - (character in ")}")
        yield depth
    yield depth


def _parse(text: str) -> list[Any]:
    """math-verify's reading of a formula, unevaluated; empty where it has none."""
    from math_verify import LatexExtractionConfig, parse  # brings sympy, which takes a second to import

    # It warns of the missing time limit, for which the bounds above stand.
    logging.getLogger("math_verify.parser").addFilter(_no_timeout_warning)
    formula = [LatexExtractionConfig()]
    return list(parse(f"${text}$", formula, fallback_mode="no_fallback", parsing_timeout=None))


def _no_timeout_warning(record: logging.LogRecord) -> bool:
    return "Timeout is disabled" not in record.getMessage()


def _value(node: Any, values: Mapping[str, Fraction]) -> Any:
    """An expression worked out from the leaves up: sympy's number; None where it is none or too large."""
    import sympy

    if node.is_Symbol:
        value = values.get(node.name)
        return None if value is None else sympy.Rational(value.numerator, value.denominator)
    if node.is_Rational or node is sympy.pi:
        return node
    if not isinstance(node, sympy.Add | sympy.Mul | sympy.Pow | sympy.UnevaluatedExpr):
        return None
    parts = [_value(part, values) for part in node.args]
    if any(part is None for part in parts):
        return None
    if isinstance(node, sympy.Pow) and not _small_power(*parts):
        return None
    value = parts[0] if isinstance(node, sympy.UnevaluatedExpr) else node.func(*parts)
    return value if not value.is_Rational or _bits(value) <= _MOST_BITS else None


def _small_power(base: Any, exponent: Any) -> bool:
    """Whether a power can be worked out: finite, and of no more than some thousand bits."""
    if not exponent.is_Rational or (base.is_zero and exponent <= 0):
        return False
    bits = _bits(base) if base.is_Rational else _LONGEST
    return bool(bits * abs(exponent) <= _MOST_BITS)


def _bits(value: Any) -> int:
    return int(value.p).bit_length() + int(value.q).bit_length()


def _number(text: str, value: Any) -> Number | None:
    if value.is_Rational:
        exact = Fraction(int(value.p), int(value.q))
        return Number(str(exact), (exact,), None)
    approximate = value.evalf(_IRRATIONAL_PLACES + 20)
    if not approximate.is_Float or abs(approximate) >= _LARGEST_IRRATIONAL:
        return None
    scale = 10**_IRRATIONAL_PLACES
    return Number(text, (Fraction(round(Fraction(str(approximate)) * scale), scale),), _IRRATIONAL_PLACES)
