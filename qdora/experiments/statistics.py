"""Statistics of a comparison: intervals of scores, paired differences of arms, correction for many tests.

Two samples are drawn in a comparison: the questions, out of all that the task could ask, and the seeds, out
of all trainings.  They are crossed, not nested: every seed of every arm answers the same questions.  The
bootstrap resamples both, each with the other kept, and adds the two deviations:

- Questions are drawn jointly for all seeds and for both arms.
- Seeds are drawn jointly for both arms where both have the same seeds: a seed decides the order of the
  batches and the initial A of both, and the differences of the pairs are independent draws whether or not
  the two results of a pair resemble each other.  Arms with other seeds are drawn independently.
- S - 1 of S seeds are drawn.  The variance of S draws falls short by (S - 1) / S, a third with three seeds
  (Rao and Wu 1988); of the questions there are enough.
- Several tasks share their draws of seeds, since one training answers all of them, and not those of
  questions.

With variances s of seeds, q of questions and e of single answers, S seeds and Q questions, the variance of a
mean is s/S + q/Q + e/(SQ), the one here s/S + q/Q + 2e/(SQ): never too small.  Drawing seeds and questions
at once has 3e/(SQ) (McCullagh 2000, Owen 2007), by which three seeds would say little more than one.

With one seed nothing is known of the spread over seeds: intervals and tests are then about these trained
models on other questions, not about other trainings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from qdora.evaluation.scores import binomial_stderr, paired_difference, wilson_interval

SIGNIFICANCE = 0.05
RESAMPLES = 10_000
_GENERATOR_SEED = 20402

Answers: TypeAlias = Mapping[int, Sequence[bool]]
"""By seed, whether each question was answered correctly, in the same order for all seeds and arms."""
Verdict = Literal["higher", "lower", "no difference shown"]


@dataclass(frozen=True)
class Estimate:
    """A score, or a difference of scores, with its uncertainty; all are fractions.

    Attributes:
        value: mean over tasks, seeds and questions.
        stderr: standard error.
        low, high: 95% interval.
    """

    value: float
    stderr: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference(Estimate):
    """An arm minus the reference arm on the same questions.

    Attributes:
        p_value: two-sided, of "the arms are equally good", before correction.
        test: which test that is.
        seeds: `one`: each arm has one seed, over which nothing is said; `paired`: both have the same seeds;
            `independent`: they have other seeds, or other numbers of them.
    """

    p_value: float
    test: Literal["exact McNemar", "bootstrap"]
    seeds: Literal["one", "paired", "independent"]


def estimate(tasks: Sequence[Answers]) -> Estimate:
    """The score of an arm: of one task, or the unweighted mean over several.

    The interval of one task is Wilson's, at the number of independent questions that would have its standard
    error: with one seed that is their number.  The interval of a mean is of percentiles of the bootstrap.

    Raises: ValueError: there is no task, seed or question, or tasks have other seeds.
    Source: Korn and Graubard, Survey Methodology 24 (1998) 193, for the effective number.
    """
    answers = _arrays(tasks, list(tasks[0]))
    value = float(np.mean([answers_SQ.mean() for answers_SQ in answers]))
    seeds, questions = answers[0].shape
    if len(answers) == 1 and seeds == 1:
        correct = int(answers[0].sum())
        return Estimate(value, binomial_stderr(correct, questions), *wilson_interval(correct, questions))
    generator = np.random.default_rng(_GENERATOR_SEED)
    resampled_B = _resample(answers, np.full(seeds, 1 / seeds), _seed_deviations(seeds, generator), generator)
    stderr = float(resampled_B.std())
    if len(answers) > 1:
        numbers = [answers_SQ.shape[1] for answers_SQ in answers]
        return Estimate(value, stderr, *_percentiles(resampled_B, numbers, lowest=0))
    # Where all answers are right, or all wrong, nothing is known of how much seeds resemble each other.
    effective = value * (1 - value) / stderr**2 if stderr else float(questions)
    return Estimate(value, stderr, *_wilson(value, min(effective, seeds * questions)))


def difference(arm: Sequence[Answers], reference: Sequence[Answers]) -> Difference:
    """An arm minus the reference on one task, or in the unweighted mean over several.

    The interval is of percentiles of the bootstrap.  With one task and one seed the test is McNemar's, exact;
    else the p-value is that of the bootstrap: twice the smaller part of the resamples on one side of 0.

    Args:
        arm, reference: the same tasks and questions in the same order.
    Raises: ValueError: they are not the same, or there is no task, seed or question.
    """
    paired = set(arm[0]) == set(reference[0])
    arrays = _arrays(arm, sorted(arm[0])), _arrays(reference, sorted(reference[0]))
    numbers = [[answers_SQ.shape[1] for answers_SQ in answers] for answers in arrays]
    if numbers[0] != numbers[1]:
        raise ValueError(f"answers to {numbers[0]} questions compared with answers to {numbers[1]}")
    generator = np.random.default_rng(_GENERATOR_SEED)
    seeds, of_reference = len(arm[0]), len(reference[0])
    deviations_BS = _seed_deviations(seeds, generator)
    of_reference_BS = deviations_BS if paired else _seed_deviations(of_reference, generator)
    resampled_B = _resample(
        [np.concatenate(both) for both in zip(*arrays, strict=True)],
        np.repeat([1 / seeds, -1 / of_reference], [seeds, of_reference]),
        np.concatenate([deviations_BS, -of_reference_BS], axis=1),
        generator,
    )
    low, high = _percentiles(resampled_B, numbers[0], lowest=-1)
    one_seed = seeds == of_reference == 1
    if one_seed and len(arm) == 1:
        exact = paired_difference(*(answers[0][0].tolist() for answers in arrays))
        return Difference(exact.difference, exact.stderr, low, high, exact.p_value, "exact McNemar", "one")
    means = [np.mean([answers_SQ.mean() for answers_SQ in answers]) for answers in arrays]
    return Difference(
        float(means[0] - means[1]),
        float(resampled_B.std()),
        low,
        high,
        _two_sided(resampled_B),
        "bootstrap",
        "one" if one_seed else "paired" if paired else "independent",
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for the number of tests, in their order.

    Source: Holm, Scandinavian Journal of Statistics 6 (1979) 65.
    """
    if not p_values:
        return []
    from statsmodels.stats.multitest import multipletests  # with pandas

    return [float(p) for p in multipletests(p_values, method="holm")[1]]


def verdict(found: Difference, p_corrected: float) -> Verdict:
    """What a difference shows: something only where the corrected test and the interval both say so."""
    if p_corrected >= SIGNIFICANCE or found.low <= 0 <= found.high:
        return "no difference shown"
    return "higher" if found.value > 0 else "lower"


def _arrays(tasks: Sequence[Answers], seeds: Sequence[int]) -> list[NDArray[np.bool_]]:
    """The answers of each task as (seeds, questions)."""
    if any(set(answers) != set(seeds) for answers in tasks):
        raise ValueError(f"tasks with other seeds: {[sorted(answers) for answers in tasks]}")
    arrays = [np.array([answers[seed] for seed in seeds], dtype=bool) for answers in tasks]
    if not all(answers_SQ.size for answers_SQ in arrays):
        raise ValueError("a score of no answers")
    return arrays


def _seed_deviations(seeds: int, generator: np.random.Generator) -> NDArray[np.float64]:
    """By how much the weight of each seed differs from 1 / S in each resample, (resamples, seeds)."""
    if seeds == 1:
        return np.zeros((RESAMPLES, 1))
    drawn_BS = generator.multinomial(seeds - 1, [1 / seeds] * seeds, size=RESAMPLES)
    return drawn_BS / (seeds - 1) - 1 / seeds


def _resample(
    tasks: Sequence[NDArray[np.bool_]],
    weights_R: NDArray[np.float64],
    deviations_BR: NDArray[np.float64],
    generator: np.random.Generator,
) -> NDArray[np.float64]:
    """Unweighted mean over tasks of the weighted sum of rows, in each resample; a row is a seed of an arm.

    Args:
        tasks: answers (rows, questions) of each.
        weights_R: of the rows, while questions are drawn.
        deviations_BR: of the rows' weights, while seeds are drawn.
    """
    by_task = []
    for answers_RQ in tasks:
        # Questions of the same value are interchangeable, so their number is drawn at once.
        values_K, counts_K = np.unique(np.round(weights_R @ answers_RQ, 12), return_counts=True)
        questions = answers_RQ.shape[1]
        drawn_BK = generator.multinomial(questions, counts_K / questions, size=RESAMPLES)
        by_task.append(drawn_BK @ values_K / questions)
    means_R = np.mean([answers_RQ.mean(axis=1) for answers_RQ in tasks], axis=0)
    # A difference of 0 is 0, whatever the rounding of the sums.
    resampled_B: NDArray[np.float64] = np.round(np.mean(by_task, axis=0) + deviations_BR @ means_R, 12)
    return resampled_B


def _percentiles(
    resampled_B: NDArray[np.float64], questions: Sequence[int], lowest: float
) -> tuple[float, float]:
    """The 95% interval of the resamples.

    Where all questions have the same value there is no spread to draw: then as far to both sides as Wilson's
    bound for other values, none of which was found in so many questions.

    Args:
        questions: number of each task.
        lowest: possible value; the highest is 1.
    """
    low, high = map(float, np.quantile(resampled_B, [SIGNIFICANCE / 2, 1 - SIGNIFICANCE / 2]))
    if low < high:
        return low, high
    bound = float(np.mean([wilson_interval(0, number)[1] for number in questions]))
    return max(lowest, low - bound), min(1.0, high + bound)


def _two_sided(resampled_B: NDArray[np.float64]) -> float:
    """Never 0: the smallest is 2 / (resamples + 1)."""
    tail = min(np.count_nonzero(resampled_B <= 0), np.count_nonzero(resampled_B >= 0))
    return min(1.0, 2 * (1 + int(tail)) / (len(resampled_B) + 1))


def _wilson(value: float, questions: float) -> tuple[float, float]:
    from statsmodels.stats.proportion import proportion_confint  # takes numbers that are not integers

    low, high = proportion_confint(value * questions, questions, alpha=SIGNIFICANCE, method="wilson")
    return float(low), float(high)
