"""Differences between arms, question by question, seeds averaged first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from qdora.evaluation.statistics import paired_difference


@dataclass(frozen=True)
class Difference:
    """An arm minus the reference arm, on the same questions.

    Attributes:
        points: difference of exact match in percentage points.
        stderr: its standard error in points, over questions.
        p_value: two-sided, of "no difference": exact McNemar with one seed, else from the
            normal distribution of the mean over questions.
    """

    points: float
    stderr: float
    p_value: float


def mean_and_stderr(correct_SQ: Sequence[Sequence[bool]]) -> tuple[float, float]:
    """Exact match over seeds and questions, and its standard error over questions.

    Questions are the sample: the answers of several seeds to one question are not independent,
    so they are averaged before the spread is taken.

    Args:
        correct_SQ: S seeds, Q questions.
    """
    per_question = _over_seeds(correct_SQ)
    mean = sum(per_question) / len(per_question)
    return mean, _stderr(per_question, mean)


def difference(arm_SQ: Sequence[Sequence[bool]], reference_SQ: Sequence[Sequence[bool]]) -> Difference:
    """Compare two arms on the same questions and seeds.

    Raises: ValueError: they do not answer the same questions.
    """
    if len(arm_SQ) == 1:
        paired = paired_difference(arm_SQ[0], reference_SQ[0])
        return Difference(100 * paired.difference, 100 * paired.stderr, paired.p_value)
    deltas = [a - b for a, b in zip(_over_seeds(arm_SQ), _over_seeds(reference_SQ), strict=True)]
    mean = sum(deltas) / len(deltas)
    stderr = _stderr(deltas, mean)
    p_value = math.erfc(abs(mean) / stderr / math.sqrt(2)) if stderr else float(mean == 0)
    return Difference(100 * mean, 100 * stderr, p_value)


def _over_seeds(correct_SQ: Sequence[Sequence[bool]]) -> list[float]:
    return [sum(answers) / len(answers) for answers in zip(*correct_SQ, strict=True)]


def _stderr(values: Sequence[float], mean: float) -> float:
    return math.sqrt(sum((v - mean) ** 2 for v in values)) / len(values)
