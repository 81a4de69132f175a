"""Batches: every example once an epoch, the same at every resume."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qdora.data.batches import BatchPlan, batches_per_epoch, collate
from qdora.data.tokenize import TokenizedExample

PLANS = {
    "lengths": st.lists(st.integers(1, 50), min_size=1, max_size=300),
    "batch_size": st.integers(1, 20),
    "seed": st.integers(0, 2**32),
}


@given(**PLANS, epoch=st.integers(0, 3))
def test_every_example_once_an_epoch(lengths, batch_size, seed, epoch):
    """Catches: an example dropped, repeated or carried into the next epoch; a small batch elsewhere."""
    plan = BatchPlan(lengths, batch_size, seed)
    steps = plan.steps_per_epoch
    batches = [plan.batch(epoch * steps + i) for i in range(steps)]
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert len(batches[-1]) == (len(lengths) % batch_size or batch_size)


@given(**PLANS, steps=st.lists(st.integers(0, 100), min_size=1, max_size=6))
def test_step_alone_decides(lengths, batch_size, seed, steps):
    """Catches: a plan with memory, so that a resumed run sees other batches."""
    plan = BatchPlan(lengths, batch_size, seed)
    assert [plan.batch(step) for step in steps] == [
        BatchPlan(lengths, batch_size, seed).batch(step) for step in steps
    ]


def test_epochs_and_seeds_differ():
    """Catches: the same order in every epoch or for every seed."""
    lengths = [1 + i % 7 for i in range(64)]
    plan, other = BatchPlan(lengths, 8, 0), BatchPlan(lengths, 8, 1)

    def epoch(p, e):
        return [p.batch(e * 8 + i) for i in range(8)]

    assert epoch(plan, 0) != epoch(plan, 1)
    assert epoch(plan, 0) != epoch(other, 0)


def test_recorded_order():
    """Catches: an order that a new version changes, so that an old checkpoint resumes elsewhere."""
    assert BatchPlan([1] * 11, 4, 7).batch(4) == [7, 8, 1, 3]


def test_grouped_by_length_and_mixed():
    """Catches: padding as without grouping, or batches that go from short to long."""
    lengths = [1 + (i * 37) % 100 for i in range(800)]
    plan = BatchPlan(lengths, 8, 0)
    batches = [[lengths[i] for i in plan.batch(step)] for step in range(plan.steps_per_epoch)]
    padded = sum(max(batch) * len(batch) for batch in batches)
    assert padded < 1.1 * sum(lengths)
    firsts = [batch[0] for batch in batches]
    assert firsts != sorted(firsts)


def test_returned_batch_is_a_copy():
    """Catches: a caller that changes a batch and with it the cached plan."""
    plan = BatchPlan([3, 2, 1], 3, 0)
    first = plan.batch(0)
    plan.batch(0).clear()
    assert plan.batch(0) == first


@pytest.mark.parametrize(("count", "size", "expected"), [(1, 4, 1), (4, 4, 1), (5, 4, 2), (0, 4, 0)])
def test_batches_per_epoch(count, size, expected):
    """Catches: the last, smaller batch not counted."""
    assert batches_per_epoch(count, size) == expected


def test_impossible_plans():
    """Catches: an endless loop or a division by zero."""
    with pytest.raises(ValueError, match="cannot plan"):
        BatchPlan([], 4, 0)
    with pytest.raises(ValueError, match="cannot plan"):
        BatchPlan([1], 0, 0)
    with pytest.raises(ValueError, match="negative"):
        BatchPlan([1], 1, 0).batch(-1)


def test_collate():
    """Catches: loss on the prompt or on padding, EOS untrained where it pads, shifted labels."""
    eos = 2
    examples = [
        TokenizedExample([5, 6, 7, eos], 2, "f:1"),
        TokenizedExample([8, 9, 3, 4, 5, eos], 3, "f:2"),
    ]
    batch = collate(examples, pad_id=eos)
    assert batch.input_ids_BT.tolist() == [[5, 6, 7, eos, eos, eos], [8, 9, 3, 4, 5, eos]]
    assert batch.labels_BT.tolist() == [[-100, -100, 7, eos, -100, -100], [-100, -100, -100, 4, 5, eos]]
    assert batch.input_ids_BT.dtype == batch.labels_BT.dtype == torch.int64
    with pytest.raises(ValueError, match="no examples"):
        collate([], 0)
