"""Intervals and tests of a comparison, by hand and against scipy and statsmodels."""

from __future__ import annotations

import math
from itertools import chain

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

from qdora.experiments import statistics
from qdora.experiments.statistics import Answers, Difference, difference, estimate, holm, verdict

T, F = True, False


def answers(correct_SQ, seeds=None) -> Answers:
    rows = np.asarray(correct_SQ, dtype=bool)
    return dict(zip(seeds or range(len(rows)), rows.tolist(), strict=True))


def draw(generator, score_SQ) -> Answers:
    """Answers that are right with the probabilities given."""
    return answers(generator.random(np.shape(score_SQ)) < score_SQ)


def test_mcnemars_test_by_hand():
    """Catches: arms compared as if they had answered different questions; answers that agree counted."""
    a, b = answers([[T, T, T, T, F, F]]), answers([[T, F, F, F, F, F]])
    found = difference([a], [b])
    assert found.value == pytest.approx(3 / 6)
    assert found.p_value == pytest.approx(2 * 0.5**3)
    assert (found.test, found.seeds) == ("exact McNemar", "one")


def test_mcnemars_test_and_wilsons_interval_against_statsmodels():
    """Catches: discordant answers counted the wrong way round; an interval of another level."""
    generator = np.random.default_rng(1)
    a, b = draw(generator, np.full((1, 90), 0.7)), draw(generator, np.full((1, 90), 0.5))
    x, y = np.array(a[0]), np.array(b[0])
    table = [[np.sum(x & y), np.sum(x & ~y)], [np.sum(~x & y), np.sum(~x & ~y)]]
    assert difference([a], [b]).p_value == pytest.approx(mcnemar(table, exact=True).pvalue)
    found = estimate([a])
    expected = proportion_confint(int(x.sum()), 90, alpha=0.05, method="wilson")
    assert (found.low, found.high) == pytest.approx(expected)
    assert found.stderr == pytest.approx(math.sqrt(found.value * (1 - found.value) / 90))


def test_questions_are_resampled_as_scipy_does():
    """Catches: arms resampled apart from each other; an interval of another level; a wrong weight."""
    generator = np.random.default_rng(2)
    hard_Q = generator.random(150)
    a, b = draw(generator, [np.minimum(hard_Q + 0.1, 1)]), draw(generator, [hard_Q])
    found = difference([a], [b])
    expected = stats.bootstrap(
        (np.subtract(a[0], b[0], dtype=float),), np.mean, method="percentile", n_resamples=10_000, rng=3
    )
    low, high = expected.confidence_interval
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.007)
    assert found.stderr == pytest.approx(expected.standard_error, rel=0.03)


def test_seeds_and_questions_are_resampled_one_by_one():
    """Catches: questions drawn apart for the two arms or for each seed, a wrong weight of a seed, a test to
    one side: against a bootstrap that really draws questions and seeds."""
    generator = np.random.default_rng(4)
    a_SQ, b_SQ = generator.random((2, 4, 40)) < [[[0.8], [0.6], [0.7], [0.5]]] * 2
    found = difference([answers(a_SQ)], [answers(b_SQ)])
    x_SQ = np.subtract(a_SQ, b_SQ, dtype=float)
    drawn = []
    for _ in range(8000):
        s, q = generator.integers(4, size=3), generator.integers(40, size=40)
        drawn.append(x_SQ[:, q].mean() + x_SQ[s].mean() - x_SQ.mean())
    assert found.value == pytest.approx(x_SQ.mean())
    assert found.stderr == pytest.approx(np.std(drawn), rel=0.03)
    assert (found.low, found.high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.015)
    assert (found.test, found.seeds) == ("bootstrap", "paired")
    beyond = [np.mean(np.round(drawn, 12) <= 0), np.mean(np.round(drawn, 12) >= 0)]
    assert found.p_value == pytest.approx(2 * min(beyond), abs=0.03)
    assert 0.2 < found.p_value < 0.9


def test_the_spread_over_seeds_is_that_of_a_sample():
    """Catches: S draws of S seeds, whose spread is too small by a third; questions taken for seeds."""
    # 400 questions that differ in nothing but the seed: seed 0 has 0 right, seed 1 and 2 all.
    found = difference([answers([[F] * 400, [T] * 400, [T] * 400])], [answers([[F] * 400] * 3)])
    assert found.value == pytest.approx(2 / 3)
    assert found.stderr == pytest.approx(np.std([0, 1, 1], ddof=1) / math.sqrt(3), rel=0.03)


def test_seeds_are_paired_where_both_arms_have_them():
    """Catches: seeds of the two arms drawn apart, so that luck common to both arms hides what differs; seeds
    paired by their place and not by their number."""
    luck_SQ = np.repeat([[0.2], [0.5], [0.8]], 200, axis=1)
    generator = np.random.default_rng(5)
    uniform_SQ = generator.random(luck_SQ.shape)
    a_SQ, b_SQ = uniform_SQ < luck_SQ + 0.1, uniform_SQ < luck_SQ
    paired = difference([answers(a_SQ)], [answers(b_SQ)])
    shuffled = difference([answers(a_SQ)], [answers(b_SQ[[2, 0, 1]], seeds=[2, 0, 1])])
    apart = difference([answers(a_SQ)], [answers(b_SQ, seeds=[7, 8, 9])])
    assert shuffled == paired
    assert (paired.seeds, apart.seeds) == ("paired", "independent")
    assert apart.value == pytest.approx(paired.value)
    assert apart.stderr > 5 * paired.stderr
    more = difference([answers(a_SQ)], [answers(b_SQ[:1])])
    assert more.seeds == "independent"


def test_tasks_count_alike_and_share_their_seeds():
    """Catches: a mean weighted by questions; seeds drawn anew for each task, as if trained for it."""
    small, large = answers([[T] * 10]), answers([[F] * 900 + [T] * 100])
    found = estimate([small, large])
    assert found.value == pytest.approx((1 + 0.1) / 2)
    lucky = answers([[F] * 300, [T] * 300, [T] * 300])
    none = answers([[F] * 300] * 3)
    one, two = difference([lucky], [none]), difference([lucky, lucky], [none, none])
    assert two.stderr == pytest.approx(one.stderr, rel=0.03)
    assert two.value == pytest.approx(one.value)


@pytest.mark.parametrize("seeds", [1, 3])
def test_names_decide_nothing(seeds):
    """Catches: a result that depends on the order of questions or seeds, or that is another one the next
    time; an interval that is not turned round with the arms."""
    generator = np.random.default_rng(6)
    a_SQ, b_SQ = generator.random((2, seeds, 120)) < 0.55
    found = difference([answers(a_SQ)], [answers(b_SQ)])
    order = generator.permutation(120)
    assert difference([answers(a_SQ[:, order])], [answers(b_SQ[:, order])]) == found
    backwards = [dict(reversed(answers(rows).items())) for rows in (a_SQ, b_SQ)]
    assert difference([backwards[0]], [backwards[1]]) == found
    turned = difference([answers(b_SQ)], [answers(a_SQ)])
    assert turned.value == -found.value
    assert (-turned.high, -turned.low) == pytest.approx((found.low, found.high), abs=1.001 / 120)
    assert turned.p_value == pytest.approx(found.p_value, abs=0.02)


def test_nothing_is_shown_by_answers_that_are_the_same():
    """Catches: a division by a spread of 0; rounding that makes a difference out of none; an interval without
    width, as if three questions could show that there is none."""
    same = answers([[T, F, T], [F, F, T], [T, T, T]])
    found = difference([same, same], [same, same])
    bound = proportion_confint(0, 3, method="wilson")[1]
    assert found == Difference(0, 0, pytest.approx(-bound), pytest.approx(bound), 1, "bootstrap", "paired")
    assert verdict(found, found.p_value) == "no difference shown"


def test_no_right_answer_in_any_seed_is_not_a_certain_zero():
    """Catches: an interval without width at 0 and 1."""
    found = estimate([answers(np.zeros((3, 50)))])
    assert (found.low, found.high) == pytest.approx(proportion_confint(0, 50, method="wilson"))
    assert found.high > 0.05
    mean = estimate([answers(np.ones((3, 50))), answers(np.ones((3, 10)))])
    of_tasks = [proportion_confint(n, n, method="wilson")[0] for n in (50, 10)]
    assert (mean.low, mean.high) == pytest.approx((np.mean(of_tasks), 1))


def test_several_seeds_are_more_than_one_and_less_than_as_many_questions():
    """Catches: answers of several seeds to one question counted as independent, or as one."""
    generator = np.random.default_rng(7)
    hard_Q = generator.random(200)
    rows = draw(generator, np.repeat([hard_Q], 4, axis=0))
    widths = [
        one.high - one.low
        for one in (
            estimate([{0: [*chain.from_iterable(rows.values())]}]),
            estimate([rows]),
            estimate([{0: rows[0]}]),
        )
    ]
    assert widths[0] < widths[1] < widths[2] * 1.15


def test_holms_correction_by_hand():
    """Catches: a correction by the number of all tests for each of them, or none; p-values out of order."""
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.04]) == pytest.approx([0.04])
    assert holm([]) == []


@pytest.mark.parametrize(
    ("value", "low", "high", "p", "expected"),
    [
        (0.1, 0.02, 0.2, 0.049, "higher"),
        (-0.1, -0.2, -0.02, 0.049, "lower"),
        (0.1, 0.02, 0.2, 0.05, "no difference shown"),
        (0.1, 0.0, 0.2, 0.001, "no difference shown"),
        (-0.1, -0.2, 0.0, 0.001, "no difference shown"),
    ],
)
def test_a_difference_is_shown_by_test_and_interval_only(value, low, high, p, expected):
    """Catches: a difference called shown by one of the two; one called by the wrong sign."""
    assert verdict(Difference(value, 0.05, low, high, p, "bootstrap", "paired"), p) == expected


def test_other_questions_or_seeds_are_refused():
    """Catches: answers paired that belong to other questions, a mean over tasks of other trainings."""
    with pytest.raises(ValueError, match=r"answers to \[2\] questions compared with answers to \[3\]"):
        difference([answers([[T, F]])], [answers([[T, F, T]])])
    with pytest.raises(ValueError, match=r"tasks with other seeds: \[\[0\], \[0, 1\]\]"):
        estimate([answers([[T]]), answers([[T], [F]])])
    with pytest.raises(ValueError, match="a score of no answers"):
        estimate([{0: []}])


@pytest.mark.parametrize(("seeds", "spread"), [(1, 0.0), (3, 0.0), (3, 0.02), (5, 0.04)])
def test_the_interval_covers_the_truth(seeds, spread, monkeypatch):
    """Catches: an interval that is too narrow because a source of chance is left out, or far too wide.

    Args:
        spread: standard deviation of the difference between trainings, in fractions.
    """
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)
    generator = np.random.default_rng(8)
    covered, runs = 0, 200
    for _ in range(runs):
        hard_Q = generator.beta(2, 2, size=120) * 0.8
        luck_S = generator.normal(0, spread, size=(seeds, 1))
        a = draw(generator, np.clip(hard_Q + 0.1 + luck_S, 0, 1))
        found = difference([a], [draw(generator, np.repeat([hard_Q], seeds, axis=0))])
        covered += found.low <= 0.1 <= found.high
    assert 0.91 <= covered / runs <= 0.995
