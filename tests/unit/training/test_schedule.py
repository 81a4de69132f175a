"""The learning rate, step by step."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from transformers import get_scheduler

from qdora.config import TrainingConfig
from qdora.errors import InputError
from qdora.training.schedule import check_schedule, learning_rate

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


THEIRS = {
    "linear": ("linear", {}),
    "cosine": ("cosine", {}),
    "polynomial": ("polynomial", {"power": 2.0, "lr_end": 1e-5}),
    "cosine_with_minimum": ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
    "cosine_with_restarts": ("cosine_with_restarts", {"num_cycles": 2}),
    "inverse_sqrt": ("inverse_sqrt", {"timescale": 20}),
    "warmup_stable_decay": ("warmup_stable_decay", {"num_decay_steps": 9, "decay_type": "linear"}),
}


@pytest.mark.parametrize("schedule", THEIRS)
@pytest.mark.parametrize("warmup", [0, 5])
def test_after_the_warmup_it_is_transformers(schedule, warmup):
    """Catches: a schedule that is shifted by a step or by the warm-up, an option that does not reach it."""
    name, options = THEIRS[schedule]
    ours = options if schedule not in ("linear", "cosine") else {}
    config = TrainingConfig(
        max_steps=30, learning_rate=RATE, warmup_steps=warmup, schedule=schedule, schedule_options=ours
    )
    check_schedule(config)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=RATE)
    scheduler = get_scheduler(name, optimizer, warmup, 30, dict(options))
    for step in range(30):
        if step >= warmup:
            theirs = optimizer.param_groups[0]["lr"]
            assert learning_rate(config, step, 30) == pytest.approx(theirs, rel=1e-9), step
        optimizer.step()
        scheduler.step()


def test_warmup_stable_decay_by_default():
    """Catches: a decay that begins with the warm-up or never, where nothing says how long it is."""
    config = TrainingConfig(max_steps=110, learning_rate=1.0, warmup_steps=10, schedule="warmup_stable_decay")
    values = [learning_rate(config, step, 110) for step in range(110)]
    assert values[10:101] == [1.0] * 91
    assert values[100:] == sorted(values[100:], reverse=True)
    assert 0 < values[-1] < 0.1


@pytest.mark.parametrize(("ratio", "total", "steps"), [(0.1, 40, 4), (0.1, 41, 5), (0.0, 40, 0), (0.5, 1, 1)])
def test_a_warmup_ratio_is_that_many_steps(ratio, total, steps):
    """Catches: a ratio of the epochs, or rounded to no warm-up."""
    config = TrainingConfig(max_steps=total, learning_rate=1.0, warmup_ratio=ratio)
    same = TrainingConfig(max_steps=total, learning_rate=1.0, warmup_steps=steps)
    for step in range(total):
        assert learning_rate(config, step, total) == learning_rate(same, step, total)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"schedule": "linear", "schedule_options": {"power": 2}},
            "linear has no 'power'; it has no options",
        ),
        ({"schedule": "polynomial", "schedule_options": {"pover": 2}}, "no 'pover'; did you mean 'power'"),
        ({"schedule": "cosine_with_minimum"}, "cosine_with_minimum.*min_lr"),
        ({"schedule": "polynomial", "schedule_options": {"lr_end": 1.0}}, "lr_end.*smaller"),
        ({"schedule": "polynomial", "schedule_options": {"lr_end": -1e-4}}, "has a negative rate"),
        ({"schedule": "warmup_stable_decay", "schedule_options": {"num_stable_steps": 5}}, "num_decay_steps"),
        ({"schedule": "warmup_stable_decay", "schedule_options": {"decay_type": "x"}}, "Unknown decay type"),
        (
            {"warmup_steps": 3, "warmup_ratio": 0.1},
            "warmup_steps 3 and training.warmup_ratio 0.1 are both given",
        ),
        ({"warmup_ratio": 1.0}, "warmup_ratio"),
    ],
)
def test_what_is_refused(settings, message):
    """Catches: an option that is passed over, a decay that rises, two warm-ups of which one counts."""
    with pytest.raises(InputError, match=message):
        check_schedule(TrainingConfig(max_steps=20, learning_rate=RATE, **settings))
