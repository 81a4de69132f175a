"""Uncertainty of a score: standard error, interval, and the paired comparison of two scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PairedDifference:
    """Two sets of answers to the same questions.

    Attributes:
        difference: fraction correct of a minus fraction correct of b, between -1 and 1.
        stderr: standard error of the difference; pairs are compared, so question difficulty cancels.
        p_value: two-sided exact McNemar test of "a and b are equally good".
        total: questions.
    """

    difference: float
    stderr: float
    p_value: float
    total: int


def binomial_stderr(correct: int, total: int) -> float:
    """Standard error of a fraction of correct answers, sqrt(p (1 - p) / n); 0 at p = 0 and 1.

    Raises: ValueError: not 0 <= correct <= total, or total is 0.
    """
    if not 0 <= correct <= total or total == 0:
        raise ValueError(f"{correct} correct of {total}")
    p = correct / total
    return math.sqrt(p * (1 - p) / total)


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """95% interval of a fraction of correct answers; unlike p ± 2 stderr it stays honest near 0 and 1.

    Raises: ValueError: not 0 <= correct <= total, or total is 0.
    Source: Wilson, JASA 22 (1927) 209.
    """
    from scipy.stats import binomtest  # half a second to import

    interval = binomtest(correct, total).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def paired_difference(correct_a: Sequence[bool], correct_b: Sequence[bool]) -> PairedDifference:
    """Compare two sets of answers to the same questions, in the same order.

    Raises: ValueError: lengths differ, or there are no questions.
    Source: McNemar, Psychometrika 12 (1947) 153, in its exact (binomial) form.
    """
    from scipy.stats import binomtest

    total = len(correct_a)
    if total != len(correct_b):
        raise ValueError(f"paired comparison of {total} with {len(correct_b)} answers")
    if total == 0:
        raise ValueError("paired comparison of no answers")
    differences = np.asarray(correct_a, dtype=int) - np.asarray(correct_b, dtype=int)
    discordant = int(np.count_nonzero(differences))
    only_a = int(np.count_nonzero(differences > 0))
    return PairedDifference(
        difference=float(differences.mean()),
        stderr=float(differences.std() / math.sqrt(total)),
        p_value=float(binomtest(only_a, discordant).pvalue) if discordant else 1.0,
        total=total,
    )
