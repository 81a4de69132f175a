"""Training examples that are read and tokenized as they come, in an order that a seed decides."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from itertools import count, islice
from typing import TYPE_CHECKING

import numpy as np

from qdora.config import DataConfig
from qdora.data.rows import Example, Skipped, question_key, raise_for_skipped
from qdora.data.tokenize import TokenizedExample, tokenize_chunk
from qdora.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 1_000
"""Examples that are tokenized at once."""


class ExampleStream:
    """An endless sequence of batches.

    A pass goes through the rows in their order.  Each usable example takes a random place in a buffer, and
    the one that was there comes out; what is left at the end comes out in random order.  A pass draws anew.
    A batch follows from the rows, the seed and its number: to resume, the stream is read up to it.

    Args:
        read: the examples of a pass, and the rows that have none.
        tokenizer: as it is when the first example is tokenized.
        config: prompt, `max_length`, `bad_rows` and more; the seed and the buffer are those of `train`.
        excluded: keys of the questions whose examples are left out.
    Attributes:
        check: is given origin and ids of examples before they are used.
    """

    def __init__(
        self,
        read: Callable[[], Iterator[Example | Skipped]],
        tokenizer: PreTrainedTokenizerBase,
        config: DataConfig,
        excluded: Collection[int],
    ) -> None:
        self._read, self._tokenizer, self._config, self._excluded = read, tokenizer, config, excluded
        self.check: Callable[[list[tuple[str, list[int]]]], None] = lambda _: None
        self.leaked = 0
        """Examples of the first pass so far that were left out for their question."""
        self.skipped = 0
        """Rows of the first pass so far that could not be used."""
        self._examples: Iterator[TokenizedExample] | None = None
        self._next = 0

    def batch(self, step: int, batch_size: int) -> list[TokenizedExample]:
        """The examples of optimizer step `step`, counted from 0; batches before it are passed over.

        Raises:
            InputError: the rows cannot be read on, or none of a pass can be used.
            DataError: a row cannot be used, and `bad_rows` is `stop`.
        """
        if self._examples is None or step < self._next:
            self._examples, self._next, self.leaked, self.skipped = self._endless(), 0, 0, 0
        while True:
            examples = list(islice(self._examples, batch_size))
            self._next += 1
            if self._next > step:
                return examples

    def _endless(self) -> Iterator[TokenizedExample]:
        for number in count():
            empty = True
            for example in self._shuffled(number):
                empty = False
                yield example
            if empty:
                raise InputError("data.train.streaming: no row of the stream can be used")

    def _shuffled(self, number: int) -> Iterator[TokenizedExample]:
        train = self._config.train
        random = np.random.default_rng((train.seed, number))
        buffer: list[TokenizedExample] = []
        for example in self._tokenized(first_pass=number == 0):
            if len(buffer) < train.shuffle_buffer:
                buffer.append(example)
                continue
            place = int(random.integers(len(buffer)))
            yield buffer[place]
            buffer[place] = example
        for place in random.permutation(len(buffer)).tolist():
            yield buffer[place]

    def _tokenized(self, *, first_pass: bool) -> Iterator[TokenizedExample]:
        config = self._config
        rows = self._read()
        while chunk := list(islice(rows, _CHUNK)):
            bad = [row for row in chunk if isinstance(row, Skipped)]
            read = [row for row in chunk if isinstance(row, Example)]
            examples = [e for e in read if not any(question_key(q) in self._excluded for q in e.questions)]
            tokenized = tokenize_chunk(
                examples,
                self._tokenizer,
                config.prompt,
                config.max_length,
                config.parse_special_tokens,
                config.loss_on,
            )
            usable: list[TokenizedExample] = []
            for example, found in zip(examples, tokenized, strict=True):
                if isinstance(found, str):
                    bad.append(Skipped(example.origin, found))
                else:
                    usable.append(found)
            raise_for_skipped(bad, config.bad_rows)
            self.check([(example.origin, example.input_ids) for example in usable])
            if first_pass:
                self.leaked += len(read) - len(examples)
                self.skipped += len(bad)
            yield from usable
