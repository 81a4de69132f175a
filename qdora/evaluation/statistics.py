"""How sure a score is: standard error, interval, and the paired comparison of two scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_Z_95 = 1.959963984540054


@dataclass(frozen=True)
class PairedDifference:
    """Two sets of answers to the same questions.

    Attributes:
        difference: share correct of a minus share correct of b, between -1 and 1.
        stderr: standard error of the difference; pairs are compared, so question difficulty cancels.
        p_value: two-sided exact McNemar test of "a and b are equally good".
        only_a: questions that only a answers correctly.
        only_b: questions that only b answers correctly.
        total: questions.
    """

    difference: float
    stderr: float
    p_value: float
    only_a: int
    only_b: int
    total: int


def binomial_stderr(correct: int, total: int) -> float:
    """Standard error of a share of correct answers, sqrt(p (1 - p) / n); 0 at p = 0 and 1.

    Raises: ValueError: not 0 <= correct <= total, or total is 0.
    """
    p = _share(correct, total)
    return math.sqrt(p * (1 - p) / total)


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """95% interval of a share; unlike p ± 2 stderr it stays honest near 0 and 1.

    Raises: ValueError: as `binomial_stderr`.
    Source: Wilson, JASA 22 (1927) 209.
    """
    p = _share(correct, total)
    spread = _Z_95**2 / total
    centre = (p + spread / 2) / (1 + spread)
    half = math.sqrt(p * (1 - p) * spread + spread**2 / 4) / (1 + spread)
    # At the ends the formula gives 0 and 1 exactly; rounding would leave 1e-17 on the wrong side.
    return (0.0 if correct == 0 else centre - half, 1.0 if correct == total else centre + half)


def paired_difference(correct_a: Sequence[bool], correct_b: Sequence[bool]) -> PairedDifference:
    """Compare two sets of answers to the same questions, in the same order.

    Raises: ValueError: lengths differ, or there are no questions.
    Source: McNemar, Psychometrika 12 (1947) 153, in its exact (binomial) form.
    """
    if len(correct_a) != len(correct_b):
        raise ValueError(f"paired comparison of {len(correct_a)} with {len(correct_b)} answers")
    total = len(correct_a)
    if total == 0:
        raise ValueError("paired comparison of no answers")
    only_a = sum(a and not b for a, b in zip(correct_a, correct_b, strict=True))
    only_b = sum(b and not a for a, b in zip(correct_a, correct_b, strict=True))
    difference = (only_a - only_b) / total
    variance = (only_a + only_b) / total - difference**2
    return PairedDifference(
        difference=difference,
        stderr=math.sqrt(max(0.0, variance) / total),
        p_value=_mcnemar(only_a, only_b),
        only_a=only_a,
        only_b=only_b,
        total=total,
    )


def _mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided tail of Binomial(only_a + only_b, 1/2), in exact integers."""
    n = only_a + only_b
    term = tail = 1
    for k in range(min(only_a, only_b)):
        term = term * (n - k) // (k + 1)
        tail += term
    # Integers divide exactly rounded, however large; floats would overflow from n = 1024.
    return min(1.0, float(2 * tail / (1 << n)))


def _share(correct: int, total: int) -> float:
    if not 0 <= correct <= total or total == 0:
        raise ValueError(f"{correct} correct of {total}")
    return correct / total
