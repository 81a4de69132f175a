"""The learning rate, step by step."""

from __future__ import annotations

import itertools
import math

import pytest

from qdora.config import TrainingConfig
from qdora.training.optimizer import learning_rate

RATE = 3e-4


def rates(schedule, warmup, total):
    config = TrainingConfig(max_steps=total, learning_rate=RATE, warmup_steps=warmup, schedule=schedule)
    return [learning_rate(config, step, total) / RATE for step in range(total)]


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("linear", 0, [1.0, 0.75, 0.5, 0.25]),
        ("linear", 1, [0.5, 1.0, 2 / 3, 1 / 3]),
        ("cosine", 0, [1.0, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)]),
        ("cosine", 2, [1 / 3, 2 / 3, 1.0, 0.5]),
        ("constant", 0, [1.0] * 4),
        ("constant", 3, [0.25, 0.5, 0.75, 1.0]),
        ("linear", 9, [0.1, 0.2, 0.3, 0.4]),
        ("linear", 4, [0.2, 0.4, 0.6, 0.8]),
    ],
)
def test_table(schedule, warmup, expected):
    """Catches: a first step at rate 0, a last step at rate 0, a warm-up that overshoots the run."""
    assert rates(schedule, warmup, 4) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_one_step(schedule):
    """Catches: a division by zero, or a run of one step that trains at rate 0."""
    assert rates(schedule, 0, 1) == [1.0]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_rises_then_falls_and_stays_positive(schedule):
    """Catches: a jump between warm-up and decay."""
    values = rates(schedule, 10, 100)
    assert values[10] == max(values) == 1.0
    assert values[:11] == sorted(values[:11])
    assert values[10:] == sorted(values[10:], reverse=True)
    assert min(values) > 0
    assert max(abs(a - b) for a, b in itertools.pairwise(values)) < 0.1
