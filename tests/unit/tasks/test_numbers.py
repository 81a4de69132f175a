"""Numbers as written, and when two of them are the same."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qdora.tasks.numbers import find_numbers, same_value

WRITTEN = [
    ("12", ["12"]),
    ("12.", ["12"]),
    ("4.0 and .5", ["4", "1/2"]),
    ("Rs.500", ["500"]),
    ("$1,234.50", ["2469/2"]),
    ("1,000,000 people", ["1000000"]),
    ("1,2,3", ["1", "2", "3"]),
    ("March 5, 2021", ["5", "2021"]),
    ("3/4/2021", ["3", "4", "2021"]),
    ("2021-03-05", ["2021", "3", "5"]),
    ("-3", ["-3"]),
    ("\u22123", ["-3"]),
    ("+7", ["7"]),
    ("-$5 or $-5", ["-5", "-5"]),
    ("5-3", ["5", "3"]),
    ("(8)-3", ["8", "3"]),
    ("16 - 12", ["16", "12"]),
    ("€3 £4", ["3", "4"]),
    ("50%", ["50"]),
    ("3/4 cup", ["3/4"]),
    ("1 1/2 cups", ["3/2"]),
    ("1 and 1/2", ["3/2"]),
    ("1½ cups, ¾ full", ["3/2", "3/4"]),
    ("12 8/4", ["2"]),
    ("3/0", []),
    (r"\frac{3}{4}", ["3/4"]),
    (r"\$1{,}200", ["1200"]),
    ("1\u202f000", ["1000"]),
    ("1.5e3", ["1500"]),
    ("3 x 10^8", ["300000000"]),
    (r"2 \times 10", ["2", "10"]),
    ("10²", ["10"]),
    ("no number", []),
    ("9" * 5000, []),
    ("1e999999", ["1", "999999"]),
]


@pytest.mark.parametrize(("text", "values"), WRITTEN)
def test_numbers_are_read(text: str, values: list[str]) -> None:
    """Catches: dates read as fractions, operators read as signs, cut thousands, digit strings that crash."""
    assert [number.value for number in find_numbers(text)] == [(Fraction(value),) for value in values]


def test_ratios_and_times_keep_their_parts() -> None:
    """Catches: "3:2" read as its last number 2."""
    assert [number.value for number in find_numbers("3:2, 10:30")] == [(3, 2), (10, 30)]


SAME = [
    ("4", "4.00", True),
    ("1,000", "1000", True),
    ("1 1/2", "1.5", True),
    ("50%", "50", True),
    ("50%", "0.5", False),
    ("3:2", "3:2", True),
    ("6:4", "3:2", False),
    ("3:2", "1.5", False),
    ("1/3", "0.33", True),
    ("0.33", "1/3", True),
    ("1/3", "0.3", False),
    ("1/3", "0.34", False),
    ("2/3", "0.66", False),
    ("0.3333333333", "0.33", True),
    ("6.666666666666667", "6.67", True),
    ("6.67", "7", False),
    ("2.46", "2.5", False),
    ("2.496", "2.50", False),
    ("1/8", "0.13", False),
    ("0.666666666666666", "0.6666666666666667", True),
    ("1.3333333333333335", "1.3333333333333333", True),
    ("0.000012", "0.000013", False),
    ("-3", "3", False),
    ("1/3", "2/6", True),
]


@pytest.mark.parametrize(("one", "other", "same"), SAME)
def test_same_value(one: str, other: str, same: bool) -> None:
    """Catches: a tolerance that accepts a wrong answer, or refuses a rounded 1/3."""
    (a,), (b,) = find_numbers(one), find_numbers(other)
    assert same_value(a, b) is same
    assert same_value(b, a) is same


@given(st.integers(-(10**12), 10**12), st.integers(0, 99))
def test_money_round_trip(whole: int, cents: int) -> None:
    """Catches: sign, thousands commas or cents lost in any magnitude."""
    sign = "-" if whole < 0 else ""
    (number,) = find_numbers(f"{sign}${abs(whole):,}.{cents:02}")
    expected = abs(whole) + Fraction(cents, 100)
    assert number.value == (-expected if sign else expected,)


@given(st.text(alphabet="0123456789.,:/-+ $%e^x*10½\\frac{}", max_size=60))
def test_any_text_is_survived(text: str) -> None:
    """Catches: a crash on malformed numbers, in the middle of a long evaluation."""
    for number in find_numbers(text):
        assert same_value(number, number)
