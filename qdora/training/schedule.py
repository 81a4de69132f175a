"""The learning rate of every step: a warm-up, then a constant or a decay."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, cast

import torch

from qdora.config import TrainingConfig
from qdora.errors import InputError, suggest

_THEIRS = {
    "polynomial": "polynomial",
    "cosine_with_minimum": "cosine_with_min_lr",
    "cosine_with_restarts": "cosine_with_restarts",
    "inverse_sqrt": "inverse_sqrt",
    "warmup_stable_decay": "warmup_stable_decay",
}
"""Schedules of transformers by their names here."""
STABLE = 0.9
"""Of the steps after the warm-up: the fraction at the full rate in `warmup_stable_decay`, unless told."""


def learning_rate(config: TrainingConfig, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0) of `total_steps`.

    Rises linearly over the warm-up, to the configured rate on the step after it; then as `training.schedule`
    says.
    """
    warmup = warmup_steps(config, total_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return config.learning_rate
    if config.schedule in _THEIRS:
        return config.learning_rate * _their_factor(config, total_steps)(step)
    progress = (step - warmup) / max(1, total_steps - warmup)
    if config.schedule == "linear":
        return config.learning_rate * (1 - progress)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def warmup_steps(config: TrainingConfig, total_steps: int) -> int:
    """Steps before the full rate."""
    if config.warmup_ratio is None:
        return config.warmup_steps
    return math.ceil(config.warmup_ratio * total_steps)


def check_schedule(config: TrainingConfig) -> None:
    """Refuse options that a schedule does not have, before a weight is read.

    Raises: InputError: the option, and what is allowed.
    """
    allowed = _options(config.schedule)
    for option in config.schedule_options:
        if option not in allowed:
            named = suggest(option, allowed) if allowed else "it has no options"
            raise InputError(f"training.schedule_options: {config.schedule} has no {option!r}; {named}")
    if config.schedule not in _THEIRS:
        return
    try:
        total = 1000 if config.max_steps is None else config.max_steps
        rates = [_their_factor(config, total)(step) for step in range(warmup_steps(config, total), total)]
    except (TypeError, ValueError) as error:
        raise InputError(
            f"training.schedule {config.schedule!r} with training.schedule_options "
            f"{config.schedule_options}: {error}"
        ) from None
    if not all(math.isfinite(rate) and rate >= 0 for rate in rates):
        raise InputError(
            f"training.schedule {config.schedule!r} with training.schedule_options "
            f"{config.schedule_options} has a negative rate"
        )


def _options(schedule: str) -> list[str]:
    if schedule not in _THEIRS:
        return []
    from transformers import SchedulerType  # with the model's code
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

    function = cast("Callable[..., Any]", TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(_THEIRS[schedule])])
    ours = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch", "warmup_type")
    return [name for name in inspect.signature(function).parameters if name not in ours]


def _their_factor(config: TrainingConfig, total_steps: int) -> Callable[[int], float]:
    """The factor of the rate after the warm-up, by step."""
    options = dict(config.schedule_options)
    warmup = warmup_steps(config, total_steps)
    if config.schedule == "warmup_stable_decay" and not options.keys() & {
        "num_stable_steps",
        "num_decay_steps",
    }:
        options["num_decay_steps"] = max(1, total_steps - warmup - round(STABLE * (total_steps - warmup)))
    frozen = tuple(sorted(options.items()))
    return _factor(_THEIRS[config.schedule], config.learning_rate, warmup, total_steps, frozen)


@lru_cache(maxsize=8)
def _factor(
    name: str, rate: float, warmup: int, total_steps: int, options: tuple[tuple[str, Any], ...]
) -> Callable[[int], float]:
    from transformers import get_scheduler

    # A scheduler belongs to an optimizer, of which it reads the rate alone.
    optimizer = torch.optim.AdamW([torch.zeros(1)], lr=rate)
    given: Mapping[str, Any] = dict(options)
    scheduler = get_scheduler(name, optimizer, warmup, total_steps, dict(given))
    factor: Callable[[int], float] = scheduler.lr_lambdas[0]
    return factor
