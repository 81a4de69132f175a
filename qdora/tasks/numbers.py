r"""Numbers as people and models write them: gold answers and outputs are read alike.

Understood: thousands commas and spaces, currency signs, plus and (unicode) minus, decimals,
`3/4`, `1 1/2`, `½`, `\frac{3}{4}`, `1.5e3`, `3 x 10^8`, ratios and clock times `3:2`.
A percent sign and any unit word beside a number are left out of its value: `50%` is 50,
`12 apples` is 12.  Not understood, on purpose: number words (`five`), magnitude words
(`2 million` is 2), a decimal comma, unit conversion.  Operations, powers and roots are
`expressions`.
"""

from __future__ import annotations

import math
import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

_INTEGER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
# A leading point counts only outside words, or "Rs.500" would be a half.
_DECIMAL = rf"(?:{_INTEGER}(?:\.[0-9]+)?|(?<!\w)\.[0-9]+)"

_NUMBER = re.compile(
    rf"""
    (?P<sign>(?<![\w)\]%.])[-+])?           # after a digit or a bracket it is an operator: 5-3
    (?:[$€£]\s?)?
    (?P<inner_sign>(?<=[$€£])-)?            # $-5
    (?:
        (?<![/\w.])                         # 3/4/2021 is a date, not a fraction
        (?:(?P<whole>{_INTEGER})\s(?:and\s)?)?
        (?P<numerator>{_DECIMAL})/(?P<denominator>{_DECIMAL})(?![/0-9]|\.[0-9])
      |
        (?P<ratio>{_DECIMAL}(?::{_DECIMAL})+)
      |
        (?P<decimal>{_DECIMAL})
        (?:
            [eE](?P<exponent>[-+]?[0-9]{{1,3}})(?!\w)
          |
            \s?[x×*]\s?10\s?(?:\^|\*\*)\s?\{{?(?P<power>[-+]?[0-9]{{1,3}})(?![0-9])\}}?
        )?
    )
    """,
    re.VERBOSE | re.ASCII,
)

_ORNAMENT = re.compile(r"[$€£]\s?|^\+|,")
_MACROS = (("\\$", ""), ("\\%", "%"), ("{,}", ","), ("\\!", ""))
_DEGREE_OR_ORDINAL = r"(?:\\circ\b|(?:st|nd|rd|th)\b|\\(?:text|mathrm)\s*\{\s*(?:st|nd|rd|th)\s*\})"
_LATEX = (
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\(?:approx|simeq)(?![a-zA-Z])"), "≈"),
    (re.compile(r"\\(?:left|right|displaystyle)(?![a-zA-Z])|\\[,;:]"), ""),
    (re.compile(rf"\^\s*(?:{_DEGREE_OR_ORDINAL}|\{{\s*{_DEGREE_OR_ORDINAL}\s*\}})"), ""),
    (re.compile(r"\\ "), " "),
    # A power of a unit: cm^2.
    (
        re.compile(
            r"(\\(?:text|math)[a-z]*\s*\{[^{}]{0,40}\}|(?<!\\pi)(?<=[a-zA-Z]))\s?\^\s?(?:\{[23]\}|[23](?![0-9]))"
        ),
        r"\1",
    ),
)
_FRACTION = re.compile(
    r"((?<=[0-9])\s*)?\\frac\s*(?:\{\s*([0-9.,]+)\s*\}\s*\{\s*([0-9.,]+)\s*\}|([0-9])\s*([0-9]))(?=([0-9]))?"
)
_SPACED_THOUSANDS = re.compile(r"(?<=[0-9])(?:[\u00a0\u2009\u202f~]|\\[ ,;:])(?=[0-9]{3}(?![0-9]))")
_VULGAR_FRACTION = re.compile("[\u00bc-\u00be\u2150-\u215e]")
# Minus sign, hyphens, en dash, full-width hyphen; fraction slash; no-break, thin and narrow spaces.
_CHARACTERS = str.maketrans("\u2212\u2010\u2011\u2013\uff0d\u2044\u00a0\u2009\u202f", "-----/   ")

# A looping model can emit thousands of digits; Python refuses to convert those, and no answer has them.
_LONGEST = 100

# From here on a decimal is a float printed in full, whose last place is noise.
_FULL_PRECISION = 6
_FLOAT_NOISE = Fraction(1, 10**6)


@dataclass(frozen=True)
class Number:
    """A number found in a text.

    Attributes:
        text: as written there.
        value: its exact value; several for a ratio or a clock time.
        places: digits after the decimal point; None for a fraction.
    """

    text: str
    value: tuple[Fraction, ...]
    places: int | None

    @property
    def bare(self) -> str:
        """The text without currency sign, plus sign and thousands commas."""
        return _ORNAMENT.sub("", self.text)

    @property
    def unending(self) -> bool:
        """Whether a shorter decimal can at best be its rounding: 1/3, or 0.3333333333."""
        if self.places is not None:
            return self.places >= _FULL_PRECISION
        # A decimal is finite where its denominator divides a power of ten; this power is large enough.
        denominator = self.value[0].denominator
        return pow(10, denominator.bit_length(), denominator) != 0


def find_numbers(text: str) -> list[Number]:
    """All numbers in the text, in order; strings of digits too long to be one are skipped."""
    text = _FRACTION.sub(_slashed, plain(text))
    return [number for match in _NUMBER.finditer(text) if (number := _read(match))]


def whole_number(text: str) -> Number | None:
    """The number that a text consists of, apart from space, a percent sign and a final point."""
    text = _FRACTION.sub(_slashed, plain(text)).strip()
    match = _NUMBER.match(text)
    return _read(match) if match and text[match.end() :].strip() in ("", "%", ".", "%.") else None


def same_value(one: Number, other: Number) -> bool:
    """Whether two numbers are the same answer.

    Equal values are.  Beyond that only this: a decimal with at least two places matches an
    unending value (a fraction without a finite decimal, or a decimal of six places or more)
    that rounds to it: 0.33 matches 1/3 and 0.3333333333, not 0.334; 2.46 never matches 2.5,
    nor 7 matches 6.67.  Two decimals of six places or more match where they differ by at most
    one part in a million: the last places of a float are noise.
    Ratios match part by part, exactly: 6:4 is not 3:2.
    """
    if one.value == other.value:
        return True
    if len(one.value) > 1 or len(other.value) > 1:
        return False
    short, long = sorted((one, other), key=lambda n: math.inf if n.places is None else n.places)
    if short.places is None or short.places < 2 or not long.unending:
        return False
    difference = abs(short.value[0] - long.value[0])
    rounds_to = difference <= Fraction(1, 2 * 10**short.places)
    both_floats = long.places is not None and short.unending
    return rounds_to or (both_floats and difference <= abs(long.value[0]) * _FLOAT_NOISE)


def plain(text: str) -> str:
    r"""The text with each typographic and LaTeX spelling of a sign, space or fraction in one form.

    Fractions become `\frac`, not a slash: 3 ÷ ½ is not 3 ÷ 1 / 2.
    """
    text = _SPACED_THOUSANDS.sub(",", text)
    if any(sign in text for sign in "\\{^"):
        for macro, meaning in _MACROS:
            text = text.replace(macro, meaning)
        for pattern, spelling in _LATEX:
            text = pattern.sub(spelling, text)
    text = _VULGAR_FRACTION.sub(_vulgar, text)
    return text.translate(_CHARACTERS)


def _vulgar(match: re.Match[str]) -> str:
    # NFKC spells ½ as 1⁄2, with a fraction slash.
    numerator, _, denominator = unicodedata.normalize("NFKC", match.group()).partition("\u2044")
    return rf"\frac{{{numerator}}}{{{denominator}}}"


def _slashed(match: re.Match[str]) -> str:
    before, *parts, digit = match.groups()
    numerator, denominator = (part for part in parts if part)
    return f"{'' if before is None else ' '}{numerator}/{denominator}{' ' if digit else ''}"


def _read(match: re.Match[str]) -> Number | None:
    text = match.group().strip()
    if len(text) > _LONGEST:
        return None
    sign = -1 if "-" in (match["sign"], match["inner_sign"]) else 1
    if match["ratio"]:
        parts = [_exact(part) for part in match["ratio"].split(":")]
        return Number(text, (sign * parts[0], *parts[1:]), None)
    if match["numerator"]:
        denominator = _exact(match["denominator"])
        if denominator == 0:
            return None
        value = _exact(match["numerator"]) / denominator
        # "the 12 8/4 boards" is no mixed number: its fraction would be a proper one.
        if match["whole"] and value < 1:
            value += _exact(match["whole"])
        return Number(text, (sign * value,), None)
    power = int(match["exponent"] or match["power"] or 0)
    places = max(0, len(match["decimal"].partition(".")[2]) - power)
    return Number(text, (sign * _exact(match["decimal"]) * Fraction(10) ** power,), places)


def _exact(digits: str) -> Fraction:
    return Fraction("0" + digits.replace(",", ""))
