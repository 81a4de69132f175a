"""The bounds of what math-verify is asked, and that asking it disturbs nothing."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qdora.tasks.expressions import read_expression

OUT_OF_BOUNDS = [
    "9^{9^{9^{9}}}",
    "10^{10^{10}}",
    "9**9**9**9",
    "9^9^9",
    "9^{999999999}",
    "(9^{99})^{99}",
    "999^{999}",
    "2^{999}2^{999}",
    "2^{99}*" * 20 + "1",
    r"\sqrt{999^{99}+1}",
    r"(\sqrt{2}+1)^{99}",
    r"10^{15}\pi",
    "5!",
    "(((((1)))))",
    "1+" * 50 + "1",
    "9" * 31,
]
NO_NUMBER = [
    "",
    "(",
    ")",
    "{5}",
    "{1}{1}",
    "1 2",
    "7 1/2",
    "a",
    "2x",
    "e",
    "1/0",
    "0^{0}",
    r"\frac{1}{0}",
    r"\sqrt{-4}",
]
NO_NUMBER += [
    r"\frac{1}{0}",
    r"\sqrt{-4}",
    r"\frac{1}{2}3",
    r"1/2\pi",
    "3, 4",
    "5 (3)",
    r"\sin 30",
    r"\infty",
    "50%",
    "1:2",
    "x = 5",
]


@pytest.mark.parametrize("text", [*OUT_OF_BOUNDS, *NO_NUMBER])
def test_what_cannot_be_worked_out_is_refused(text: str) -> None:
    """Catches: a tower of powers that fills memory; sums of numbers side by side; part of a formula."""
    started = time.process_time()
    assert read_expression(text) is None
    assert time.process_time() - started < 5


@settings(deadline=None, max_examples=100)
@given(st.text(alphabet="0123456789^*/+-(){}.x√π½", max_size=30))
def test_any_expression_ends(text: str) -> None:
    """Catches: a crash, or a value without a form, in the middle of a long evaluation."""
    number = read_expression(text)
    assert number is None or (len(number.text) <= 700 and len(number.value) == 1)


def test_values_are_exact() -> None:
    """Catches: floats of math-verify, so that 0.1 + 0.2 is not 3/10; an irrational value of 15 places."""

    def value(text: str) -> Fraction:
        number = read_expression(text)
        assert number is not None
        return number.value[0]

    assert value("0.1 + 0.2") == Fraction(3, 10)
    assert value(r"\frac{0.1}{3}") == Fraction(1, 30)
    assert value(r"(\sqrt{2}+1)(\sqrt{2}-1)") == 1
    assert abs(value(r"\sqrt{2}") ** 2 - 2) < Fraction(1, 10**39)
    assert value("5(3)") == 15


def test_it_works_in_any_thread_and_keeps_signal_handlers(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: math-verify's SIGALRM, which fails outside the main thread and replaces handlers."""
    before = [signal.getsignal(number) for number in (signal.SIGALRM, signal.SIGTERM, signal.SIGINT)]
    # It warns once a process.
    monkeypatch.setattr("math_verify.parser.TIMEOUT_WARNING_SHOWN", False)
    logger = logging.getLogger("math_verify.parser")
    for kept in tuple(logger.filters):
        logger.removeFilter(kept)
    read_expression.cache_clear()
    with caplog.at_level(logging.DEBUG), ThreadPoolExecutor(4) as pool:
        found = list(pool.map(read_expression, [rf"{i} \times 5" for i in range(20)]))
        assert read_expression("2^5") is not None
    assert [number and number.value for number in found] == [(Fraction(5 * i),) for i in range(20)]
    assert [signal.getsignal(number) for number in (signal.SIGALRM, signal.SIGTERM, signal.SIGINT)] == before
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_plain_answers_import_no_sympy() -> None:
    """Catches: a second more for every command that scores, where no answer is an expression."""
    code = (
        "import sys; from qdora.tasks.scoring import score_answer; "
        "assert score_answer('5 * 3 = 15. The answer is 15 apples.', '15')['normalized'].correct; "
        "assert not {'sympy', 'math_verify'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
