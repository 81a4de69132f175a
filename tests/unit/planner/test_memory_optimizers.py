"""What each optimizer keeps, as the planner counts it."""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest
import torch
from torch import nn

from qdora.planner.internals import replaced
from qdora.planner.report import Part
from qdora.planner.simulate import record_step
from qdora.training.optimizer import AdapterOptimizer

from .scenes import architecture, launch


@cache
def bytes_kept(optimizer: str, world_size: int = 1) -> int:
    """Of one rank, between steps."""
    options = {"min_8bit_size": 1} if optimizer.endswith("8bit") else {}
    planned = launch(world_size)
    update = {"optimizer": optimizer, "optimizer_options": options}
    planned = dataclasses.replace(planned, training=planned.training.model_copy(update=update))
    return int(record_step(architecture().build(), planned).at_rest[Part.OPTIMIZER])


@pytest.mark.parametrize(
    ("optimizer", "copies"),
    [("adamw", 3), ("rmsprop", 2), ("kahan_adamw", 3), ("ranger", 4), ("adan", 5), ("lion", 2)],
)
def test_each_keeps_its_masters_and_its_own_state(optimizer, copies):
    """Catches: AdamW's two moments counted for every optimizer."""
    masters = bytes_kept("sgd")  # without momentum it keeps nothing
    assert bytes_kept(optimizer) == pytest.approx(copies * masters, rel=0.01)


def test_small_states_are_small():
    """Catches: moments of 8 bits or of rows and columns counted as if they were full."""
    masters = bytes_kept("sgd")
    assert 1.5 * masters < bytes_kept("adamw8bit") < 1.8 * masters
    assert masters < bytes_kept("adafactor") < 1.3 * masters


@pytest.mark.parametrize("optimizer", ["adamw8bit", "stableadamw", "ranger"])
def test_its_update_is_made(optimizer):
    """Catches: an update that fake tensors leave out, because a number that is read from one says so."""
    planned = launch().with_training(optimizer=optimizer)
    made = []
    kind = type(AdapterOptimizer({"a": nn.Parameter(torch.zeros(2, 2))}, planned.training)._optimizer)
    with replaced(kind, "step", lambda self, original=kind.step: made.append(original(self))):
        record_step(architecture().build(), planned)
    assert len(made) == 2  # the first, which makes its state, and that of the step


def test_shards_keep_shards():
    """Catches: a state of the full tensor on every rank.  A shard is its own master."""
    assert bytes_kept("sgd", 2) == 0
    assert bytes_kept("lion", 2) == pytest.approx(bytes_kept("sgd") / 2, rel=0.02)
