"""Differences between arms, by hand."""

from __future__ import annotations

import math

import pytest

from qdora.experiments.report import mean_and_stderr, paired_over_seeds

T, F = True, False


def test_one_seed_is_the_binomial_error_and_mcnemars_test():
    """Catches: arms compared as if they had answered different questions."""
    a, b = [T, T, T, T, F, F], [T, F, F, F, F, F]
    mean, stderr = mean_and_stderr([a])
    assert mean == pytest.approx(4 / 6)
    assert stderr == pytest.approx(math.sqrt(4 / 6 * 2 / 6 / 6))
    delta = paired_over_seeds([a], [b])
    assert delta.points == pytest.approx(50)
    assert delta.p_value == pytest.approx(2 * 0.5**3)


def test_seeds_are_averaged_before_the_spread_is_taken():
    """Catches: answers of several seeds to one question counted as independent."""
    once, twice = [[T, F, T, F]], [[T, F, T, F], [T, F, T, F]]
    assert mean_and_stderr(twice) == pytest.approx(mean_and_stderr(once))
    delta = paired_over_seeds([[T, T, F, F], [T, F, F, F]], [[F, F, F, F], [F, F, F, F]])
    assert delta.points == pytest.approx(37.5)
    assert 0 < delta.p_value < 1
