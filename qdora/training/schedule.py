"""The learning rate as a function of the step."""

from __future__ import annotations

import math

from qdora.config import TrainingConfig


def learning_rate(config: TrainingConfig, step: int, total_steps: int) -> float:
    """Rate of optimizer step `step` (from 0) of `total_steps`.

    Rises linearly over the warm-up, reaching the configured rate on its last step + 1; then
    constant, or falling to 0 after the last step, on a line or half a cosine.
    """
    warmup = config.warmup_steps
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return config.learning_rate
    progress = (step - warmup) / max(1, total_steps - warmup)
    if config.schedule == "linear":
        return config.learning_rate * (1 - progress)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
