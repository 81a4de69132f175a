"""Batches: every example once an epoch, the same at every resume."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qdora.data.batches import BatchPlan, collate, divide, fill_rows, without_labels
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


@pytest.mark.parametrize(("count", "size", "expected"), [(1, 4, 1), (4, 4, 1), (5, 4, 2)])
def test_steps_per_epoch(count, size, expected):
    """Catches: the last, smaller batch not counted."""
    assert BatchPlan([1] * count, size, 0).steps_per_epoch == expected


def test_impossible_plans():
    """Catches: an endless loop or a division by zero."""
    with pytest.raises(ValueError, match="cannot plan"):
        BatchPlan([], 4, 0)
    with pytest.raises(ValueError, match="cannot plan"):
        BatchPlan([1], 0, 0)
    with pytest.raises(ValueError, match="negative"):
        BatchPlan([1], 1, 0).batch(-1)


@given(**PLANS, room=st.integers(0, 60))
def test_filled_rows(lengths, batch_size, seed, room):
    """Catches: an example that is cut, left out or in two rows, a row beyond its tokens, two rows that would
    fit into one, an order with memory."""
    row_tokens = max(lengths) + room
    plan = BatchPlan(lengths, batch_size, seed, row_tokens)
    rows = [row for step in range(plan.steps_per_epoch) for row in plan.rows(step)]
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    filled = sorted(sum(lengths[i] for i in row) for row in rows)
    assert filled[-1] <= row_tokens
    assert len(filled) < 2 or filled[0] + filled[1] > row_tokens
    later = plan.rows(3 * plan.steps_per_epoch)
    assert later == BatchPlan(lengths, batch_size, seed, row_tokens).rows(3 * plan.steps_per_epoch)
    assert plan.batch(0) == [i for row in plan.rows(0) for i in row]


def test_rows_are_filled_where_least_room_is_left():
    """Catches: rows half empty, an order that a new version changes, so that a checkpoint is of no use."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(20, 200, (2000,), generator=generator).tolist()
    rows = fill_rows(lengths, 512, 3)
    assert sum(lengths) > 0.97 * 512 * len(rows)
    assert fill_rows([4, 3, 2, 5, 1], 6, 0) == [[2, 4, 1], [3], [0]]
    assert fill_rows(lengths, 512, 4) != rows
    with pytest.raises(ValueError, match="an example of 5 tokens in rows of 4"):
        fill_rows([4, 3, 2, 5, 1], 4, 0)


@given(lengths=PLANS["lengths"], size=st.integers(1, 20))
def test_division_into_micro_batches(lengths, size):
    """Catches: a row left out or taken twice, a micro-batch too many or too large, one with all long rows
    where they should be balanced, or with some of each where they should be alike."""
    for balanced in (False, True):
        chunks = divide(lengths, size, balanced=balanced)
        assert sorted(i for chunk in chunks for i in chunk) == list(range(len(lengths)))
        assert len(chunks) == -(-len(lengths) // size)
        assert all(0 < len(chunk) <= size for chunk in chunks)
        if not balanced:
            ordered = [lengths[i] for chunk in chunks for i in chunk]
            assert ordered == sorted(ordered)
    sums = [sum(chunk) + len(chunk) for chunk in divide(range(1, 17), 4, balanced=True)]
    assert sums == [34, 34, 34, 34]


def test_collate_joined():
    """Catches: positions that run on into the next sequence, a first token as the label of the sequence
    before it, ends of sequences in 64 bits, which no kernel reads."""
    batch = collate(
        [
            TokenizedExample([5, 6, 7, 2], 2, "f:1"),
            TokenizedExample([8, 9, 2], 0, "f:2"),
            TokenizedExample([3, 4, 2], 2, "f:3"),
        ],
        pad_id=0,
        joined=True,
    )
    assert batch.input_ids_BT.tolist() == [[5, 6, 7, 2, 8, 9, 2, 3, 4, 2]]
    assert batch.position_ids_BT.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1, 2]]
    assert batch.labelled_N.tolist() == [1, 2, 4, 5, 8]
    assert batch.targets_N.tolist() == [7, 2, 9, 2, 2]
    assert batch.segments.lengths == (4, 3, 3)
    assert batch.segments.runs == [(1, 4), (2, 3)]
    assert batch.segments.ends_S1.tolist() == [0, 4, 7, 10]
    assert batch.segments.ends_S1.dtype == torch.int32
    assert len(batch.tensors) == 5
    moved = batch.to(torch.device("meta"))
    assert {tensor.device.type for tensor in moved.tensors} == {"meta"}
    silent = without_labels(batch)
    assert len(silent.labelled_N) == len(silent.targets_N) == 0
    assert silent.input_ids_BT is batch.input_ids_BT


def test_collate():
    """Catches: loss on the prompt or on padding, EOS untrained where it pads, shifted labels."""
    eos = 2
    examples = [
        TokenizedExample([5, 6, 7, eos], 2, "f:1"),
        TokenizedExample([8, 9, 3, 4, 5, eos], 3, "f:2"),
    ]
    batch = collate(examples, pad_id=eos)
    assert batch.input_ids_BT.tolist() == [[5, 6, 7, eos, eos, eos], [8, 9, 3, 4, 5, eos]]
    assert batch.labelled_N.tolist() == [1, 2, 6 + 2, 6 + 3, 6 + 4]
    assert batch.targets_N.tolist() == [7, eos, 4, 5, eos]
    assert {tensor.dtype for tensor in batch.tensors} == {torch.int64}
    assert batch.position_ids_BT is batch.segments is None
    with pytest.raises(ValueError, match="no examples"):
        collate([], 0)
