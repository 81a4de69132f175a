"""Which examples form which optimizer step, and how they become tensors.

The plan is a pure function of (lengths, batch size, seed, packing, step): to resume, the step number is
enough.

Shape legend: B rows of a batch, T tokens of the longest one, N labelled tokens, S joined sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch

from qdora.config import PackingName
from qdora.data.tokenize import TokenizedExample

_BATCHES_IN_A_RUN = 50
"""Batches that are sorted by length as one: enough that a batch's sequences are about equally long, few
enough that batches stay random."""


_Numbers = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class Packing:
    """How examples share the rows of a micro-batch.

    Attributes:
        joined: the rows of a micro-batch are joined into one, without padding.
        row_tokens: most tokens in a row, which holds as many uncut examples as fit; None: one example.
    """

    joined: bool = False
    row_tokens: int | None = None

    @classmethod
    def of(cls, name: PackingName, max_length: int) -> Packing:
        """What `data.packing` and `data.max_length` say."""
        return cls(name != "none", max_length if name == "stream" else None)


NO_PACKING = Packing()


class BatchPlan:
    """The examples of every optimizer step; every example exactly once an epoch.

    Grouped by length, so that little is computed on padding: the epoch is shuffled, cut into runs of
    50 batches, each run sorted by length and cut into batches, and the batches are shuffled.  What
    does not fill a batch is taken from the end of the shuffled epoch, and comes last.

    Where rows hold several examples, they are filled once, and the rows are shuffled, sorted and cut.
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, seed: int, row_tokens: int | None = None
    ) -> None:
        """
        Args:
            lengths: tokens of each example.
            batch_size: rows an optimizer step.
            seed: of the order; every epoch has its own.
            row_tokens: most tokens in a row; None for one example a row.
        Raises: ValueError: no examples, one that no row has room for, or a batch size below 1.
        """
        if not lengths or batch_size < 1:
            raise ValueError(f"cannot plan batches of {batch_size} from {len(lengths)} examples")
        # Arrays, not lists of lists: of a million examples these would take 100 MB.
        self._lengths = np.asarray(lengths)
        self._members: list[_Numbers] | None = None
        """The examples in each row; None where each is one."""
        if row_tokens is not None:
            self._members = [np.array(row) for row in fill_rows(lengths, row_tokens, seed)]
            self._lengths = np.array([self._lengths[row].sum() for row in self._members])
        self.batch_size = batch_size
        self._seed = seed
        self._epoch = -1
        self._batches: tuple[_Numbers, _Numbers]

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass over the examples; the last, smaller one counts."""
        return -(-len(self._lengths) // self.batch_size)

    def rows(self, step: int) -> list[list[int]]:
        """The indices of the examples in each row of optimizer step `step`, counted from 0.

        Raises: ValueError: a negative step.
        """
        if step < 0:
            raise ValueError(f"step {step} is negative")
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._plan(epoch)
        full, rest = self._batches
        batch = (full[position] if position < len(full) else rest).tolist()
        return [[i] for i in batch] if self._members is None else [self._members[i].tolist() for i in batch]

    def batch(self, step: int) -> list[int]:
        """The indices of the examples that form optimizer step `step`, row by row.

        Raises: ValueError: a negative step.
        """
        return [i for row in self.rows(step) for i in row]

    def _plan(self, epoch: int) -> tuple[_Numbers, _Numbers]:
        """The rows of each full batch, and those of the last, smaller one."""
        generator = np.random.default_rng((self._seed, epoch))
        order = generator.permutation(len(self._lengths))
        full = len(order) - len(order) % self.batch_size
        run = _BATCHES_IN_A_RUN * self.batch_size
        for start in range(0, full, run):
            members = order[start : min(start + run, full)]
            members[:] = members[np.argsort(self._lengths[members], kind="stable")]
        batches = order[:full].reshape(-1, self.batch_size)
        return batches[generator.permutation(len(batches))], order[full:]


def fill_rows(lengths: Sequence[int], row_tokens: int, seed: int) -> list[list[int]]:
    """Examples in rows of at most `row_tokens` tokens; none is cut.

    Each example, in shuffled order, goes where it leaves least room, into a new row where there is none
    (online best fit).

    Returns: the indices of each row's examples.
    Raises: ValueError: an example that is longer than a row.
    """
    longest = max(lengths)
    if longest > row_tokens:
        raise ValueError(f"an example of {longest} tokens in rows of {row_tokens}")
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}
    """Rows by the room that is left in them."""
    rooms = 0
    """Bit r is set where some row has room for r tokens more: the smallest one that fits is found at once."""
    for i in np.random.default_rng(seed).permutation(len(lengths)).tolist():
        length = lengths[i]
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = open_rows[room].pop()
            if not open_rows[room]:
                rooms ^= 1 << room
        else:
            room, row = row_tokens, len(rows)
            rows.append([])
        rows[row].append(i)
        left = room - length
        open_rows.setdefault(left, []).append(row)
        rooms |= 1 << left
    return rows


def divide(lengths: Sequence[int], size: int, *, balanced: bool) -> list[list[int]]:
    """Rows in micro-batches of at most `size` rows, as few as possible.

    Args:
        lengths: tokens of each row.
        balanced: of about as many tokens each, so that no rank waits for another; otherwise of rows of about
            one length each, so that little is padding.
    Returns: the indices of each micro-batch's rows.
    """
    ordered = sorted(range(len(lengths)), key=lambda i: lengths[i])
    if not balanced:
        return [ordered[start : start + size] for start in range(0, len(ordered), size)]
    chunks: list[list[int]] = [[] for _ in range(-(-len(lengths) // size))]
    for i in reversed(ordered):
        open_chunks = [chunk for chunk in chunks if len(chunk) < size]
        min(open_chunks, key=lambda chunk: sum(lengths[j] for j in chunk)).append(i)
    return chunks


def describe_batches(
    plan: BatchPlan, lengths: Sequence[int], total_steps: int, micro_batch_size: int, packing: Packing
) -> str:
    """A sentence on the tokens of a step and what padding costs, over the first epoch.

    Args:
        lengths: tokens of each example.
        total_steps: of the run.
        micro_batch_size: most rows that are computed at once.
    """
    steps = min(total_steps, plan.steps_per_epoch)
    tokens = padded = 0
    for step in range(steps):
        members = [lengths[i] for i in plan.batch(step)]
        tokens += sum(members)
        chunks = divide(members, micro_batch_size, balanced=False)
        padded += sum(len(chunk) * max(members[i] for i in chunk) for chunk in chunks)
    share = f"{100 * (1 - tokens / padded):.1f}% of what a step computes"
    if packing.row_tokens is not None:
        room = steps * plan.batch_size * packing.row_tokens
        padding = f"none is padding; rows are filled to {100 * tokens / room:.1f}%"
    elif packing.joined:
        padding = f"none is padding, which would be {share} with data.packing: none"
    else:
        padding = f"padding is {share} (data.packing: batch computes none)"
    return f"batches: {tokens / steps:,.0f} tokens a step on average; {padding}"


@dataclass(frozen=True, slots=True)
class Segments:
    """The sequences that were joined into one row; none attends to another.

    Attributes:
        lengths: tokens of each, in order.
        ends_S1: (S + 1,) int32, 0 and the position behind each: the form of variable-length kernels.
    """

    lengths: tuple[int, ...]
    ends_S1: torch.Tensor

    @property
    def runs(self) -> list[tuple[int, int]]:
        """Neighbours of equal length: (how many, tokens of each)."""
        return [(len(list(same)), length) for length, same in groupby(self.lengths)]


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences as tensors: padded on the right, or joined into one row.

    Under a causal mask no token attends to padding behind it, so no attention mask is needed.
    """

    input_ids_BT: torch.Tensor
    """(B, T) int64."""
    labelled_N: torch.Tensor
    """(N,) int64, the positions, counted through all rows, whose next token is trained."""
    targets_N: torch.Tensor
    """(N,) int64, those next tokens."""
    position_ids_BT: torch.Tensor | None = None
    """(1, T) int64, each token's place in its own sequence; None where a row is one sequence."""
    segments: Segments | None = None
    """The sequences of a joined row; None where a row is one sequence."""

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All that it holds."""
        positions = [] if self.position_ids_BT is None else [self.position_ids_BT]
        ends = [] if self.segments is None else [self.segments.ends_S1]
        return [self.input_ids_BT, self.labelled_N, self.targets_N, *positions, *ends]

    def to(self, device: torch.device) -> Batch:
        """On a device; copies from pinned memory are not waited for."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """In page-locked memory, from which a GPU copies while it computes."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, move: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        positions, segments = self.position_ids_BT, self.segments
        return Batch(
            move(self.input_ids_BT),
            move(self.labelled_N),
            move(self.targets_N),
            None if positions is None else move(positions),
            None if segments is None else replace(segments, ends_S1=move(segments.ends_S1)),
        )


def collate(examples: Sequence[TokenizedExample], pad_id: int, *, joined: bool = False) -> Batch:
    """Tensors of a batch.  Labels are masked by position, so EOS is trained even where it pads.

    Args:
        joined: in one row without padding, instead of one row each.
    Raises: ValueError: no examples.
    """
    if not examples:
        raise ValueError("cannot collate a batch of no examples")
    lengths = [len(example.input_ids) for example in examples]
    # numpy, since this runs in a thread of its own: torch would start threads there.
    starts = np.cumsum([0, *lengths]) if joined else np.arange(len(examples) + 1) * max(lengths)
    ids = np.full(starts[-1], pad_id, dtype=np.int64)
    labelled, targets = [], []
    for start, example in zip(starts, examples, strict=False):
        own = ids[start : start + len(example.input_ids)]
        own[:] = example.input_ids
        trained = np.ones(len(own), dtype=bool)
        trained[: max(1, example.prompt_length)] = False  # no position comes before the first token
        for gap in example.gaps:
            trained[slice(*gap)] = False
        places = np.flatnonzero(trained)
        labelled.append(start + places - 1)
        targets.append(own[places])
    positions = segments = None
    if joined:
        positions = torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])[None])
        segments = Segments(tuple(lengths), torch.from_numpy(starts.astype(np.int32)))
    return Batch(
        torch.from_numpy(ids.reshape(1 if joined else len(examples), -1)),
        torch.from_numpy(np.concatenate(labelled)),
        torch.from_numpy(np.concatenate(targets)),
        positions,
        segments,
    )


def without_labels(batch: Batch) -> Batch:
    """The batch with no position trained: a loss of exactly 0 and gradients of 0."""
    return replace(batch, labelled_N=batch.labelled_N[:0], targets_N=batch.targets_N[:0])
