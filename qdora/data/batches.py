"""Which examples form which optimizer step, and how they become tensors.

The plan is a pure function of (lengths, batch size, seed, step): to resume, the step number is
enough.

Shape legend: B sequences of a batch, T tokens of the longest one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from qdora.data.tokenize import TokenizedExample

_BATCHES_IN_A_RUN = 50
"""Batches that are sorted by length as one: enough that a batch's sequences are about equally long, few
enough that batches stay random."""

IGNORED_LABEL = -100
"""What torch's cross entropy leaves out."""


def batches_per_epoch(count: int, batch_size: int) -> int:
    """Batches that hold `count` examples; the last, smaller one counts."""
    return -(-count // batch_size)


class BatchPlan:
    """The examples of every optimizer step; every example exactly once an epoch.

    Grouped by length, so that little is computed on padding: the epoch is shuffled, cut into runs of
    50 batches, each run sorted by length and cut into batches, and the batches are shuffled.  What
    does not fill a batch is taken from the end of the shuffled epoch, and comes last.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        """
        Args:
            lengths: tokens of each example.
            batch_size: examples an optimizer step.
            seed: of the order; every epoch has its own.
        Raises: ValueError: no examples, or a batch size below 1.
        """
        if not lengths or batch_size < 1:
            raise ValueError(f"cannot plan batches of {batch_size} from {len(lengths)} examples")
        self._lengths = np.asarray(lengths)
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = -1
        self._batches: list[list[int]] = []

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass over the examples."""
        return batches_per_epoch(len(self._lengths), self._batch_size)

    def batch(self, step: int) -> list[int]:
        """The indices of the examples that form optimizer step `step`, counted from 0.

        Raises: ValueError: a negative step.
        """
        if step < 0:
            raise ValueError(f"step {step} is negative")
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._plan(epoch)
        return list(self._batches[position])

    def _plan(self, epoch: int) -> list[list[int]]:
        generator = np.random.default_rng((self._seed, epoch))
        order = generator.permutation(len(self._lengths))
        full = len(order) - len(order) % self._batch_size
        run = _BATCHES_IN_A_RUN * self._batch_size
        batches: list[list[int]] = []
        for start in range(0, full, run):
            members = order[start : min(start + run, full)]
            by_length = members[np.argsort(self._lengths[members], kind="stable")]
            batches += by_length.reshape(-1, self._batch_size).tolist()
        mixed = [batches[i] for i in generator.permutation(len(batches))]
        return [*mixed, order[full:].tolist()] if full < len(order) else mixed


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences padded on the right.

    Under a causal mask no token attends to padding behind it, so no attention mask is needed.
    """

    input_ids_BT: torch.Tensor
    """(B, T) int64."""
    labels_BT: torch.Tensor
    """(B, T) int64, aligned with the ids, not shifted; -100 on the prompt and on padding."""


def collate(examples: Sequence[TokenizedExample], pad_id: int) -> Batch:
    """Tensors of a batch.  Labels are masked by position, so EOS is trained even where it pads.

    Raises: ValueError: no examples.
    """
    if not examples:
        raise ValueError("cannot collate a batch of no examples")
    ids = [torch.tensor(example.input_ids) for example in examples]
    labels = [ids_T.clone() for ids_T in ids]
    for labels_T, example in zip(labels, examples, strict=True):
        labels_T[: example.prompt_length] = IGNORED_LABEL
    return Batch(
        pad_sequence(ids, batch_first=True, padding_value=pad_id),
        pad_sequence(labels, batch_first=True, padding_value=IGNORED_LABEL),
    )


def without_labels(batch: Batch) -> Batch:
    """The batch with all labels ignored: a loss of exactly 0 and gradients of 0."""
    return replace(batch, labels_BT=torch.full_like(batch.labels_BT, IGNORED_LABEL))
