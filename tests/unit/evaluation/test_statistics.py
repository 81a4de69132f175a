"""Standard errors and tests against closed forms and direct computation."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qdora.evaluation.scores import binomial_stderr, paired_difference, wilson_interval


def test_binomial_stderr() -> None:
    """Catches: variance in place of its root, n - 1 in place of n."""
    assert binomial_stderr(20, 100) == pytest.approx(0.04)
    assert binomial_stderr(0, 5) == 0


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [(0, 10, 0, 0.27753), (5, 10, 0.23659, 0.76341), (10, 10, 0.72247, 1), (81, 100, 0.72223, 0.87486)],
)
def test_wilson_interval(correct: int, total: int, low: float, high: float) -> None:
    """Catches: the normal interval, which is empty at 0% and leaves [0, 1]."""
    assert wilson_interval(correct, total) == pytest.approx((low, high), abs=2e-5)


@pytest.mark.parametrize(("correct", "total"), [(1, 0), (-1, 5), (6, 5)])
def test_impossible_counts_are_refused(correct: int, total: int) -> None:
    """Catches: a share above 1 or a division by zero reported as a score."""
    with pytest.raises(ValueError, match="correct of"):
        binomial_stderr(correct, total)


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"), [(1, 5, 14 / 64), (5, 1, 14 / 64), (0, 6, 2 / 64), (3, 3, 1), (0, 0, 1)]
)
def test_mcnemar(only_a: int, only_b: int, p: float) -> None:
    """Catches: a one-sided p, a p above 1, concordant pairs counted."""
    a = [True] * only_a + [False] * only_b + [True, False] * 4
    b = [False] * only_a + [True] * only_b + [True, False] * 4
    result = paired_difference(a, b)
    assert result.p_value == pytest.approx(p)
    assert result.total == only_a + only_b + 8
    assert result.difference == pytest.approx((only_a - only_b) / result.total)


def test_mcnemar_of_many() -> None:
    """Catches: float overflow in the binomial coefficients of a full test set."""
    result = paired_difference([True] * 3000 + [False] * 3100, [False] * 3000 + [True] * 3100)
    assert result.p_value == pytest.approx(math.erfc(99 / math.sqrt(2 * 6100)), rel=1e-2)


@given(st.integers(0, 10_000), st.integers(2, 60))
def test_paired_stderr_is_that_of_the_differences(seed: int, total: int) -> None:
    """Catches: the unpaired standard error, too large where both models fail at the same questions."""
    rng = random.Random(seed)
    a = [rng.random() < 0.6 for _ in range(total)]
    b = [rng.random() < 0.4 for _ in range(total)]
    direct = statistics.pstdev([int(x) - int(y) for x, y in zip(a, b, strict=True)]) / math.sqrt(total)
    assert paired_difference(a, b).stderr == pytest.approx(direct, abs=1e-12)


def test_unequal_lengths_are_refused() -> None:
    """Catches: questions paired with others' answers."""
    with pytest.raises(ValueError, match="2 with 1"):
        paired_difference([True, False], [True])
    with pytest.raises(ValueError, match="no answers"):
        paired_difference([], [])
