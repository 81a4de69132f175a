"""Examples that are too many to be held as objects: in a file of the cache of `datasets`, mapped into memory.

The file holds all rows of a source, in their order, also those that are bad; a table is a choice of them in
an order of its own. Its name is a digest of what it was made of, so that a second start finds it.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import operator
import os
import struct
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, cast, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from huggingface_hub import constants
from tqdm import tqdm

from qdora.data.rows import (
    IN_MEMORY,
    Example,
    Row,
    Skipped,
    Turn,
    example_bytes,
    fingerprint,
    question_key,
)
from qdora.files import write_file

_CHUNK = 1_000
"""Rows that are objects at the same time."""
_MAPPED = 100
"""Rows that are taken until their pages of the file are given back. They count as the process's memory, and
with each page that is read the system maps those around it, 64 KiB: some 10 MiB of rows at random."""
_BATCHES = 16
"""Batches of rows of which a column is read until then."""

_TEXTS = ("question", "completion", "answer", "task", "origin")
_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in _TEXTS),
        ("options", pa.list_(pa.string())),
        ("turns", pa.string()),  # JSON; empty where the example is no chat
        ("problem", pa.string()),  # why there is no example; empty where there is one
        ("keys", pa.list_(pa.int64())),  # of its questions
        ("digest", pa.list_(pa.int64(), 2)),
    ]
)

RowNumbers = np.ndarray[Any, np.dtype[np.int32]]
"""Numbers of rows; there are several arrays of them at a time."""


def cache_folder() -> Path:
    """Where tables are kept; `HF_DATASETS_CACHE` moves it."""
    # `datasets.config` has it too, and costs 60 MB.
    given = os.environ.get("HF_DATASETS_CACHE")
    return Path(given or Path(constants.HF_HOME, "datasets")) / "qdora"


def table_key(*parts: str) -> str:
    """A name for what follows from `parts` and from the code that makes tables."""
    digest = hashlib.sha256()
    for room in ("data", "tasks"):
        for path in sorted((Path(__file__).parents[1] / room).glob("*.py")):
            digest.update(path.read_bytes())
    digest.update(json.dumps(parts).encode())
    return digest.hexdigest()[:32]


def write_once(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file of the cache, unless it is there; of the processes of a machine one writes, others wait.

    Raises: InputError: it cannot be written.
    """
    if path.exists():
        return
    from filelock import FileLock  # brought by datasets

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.exists():
            write_file(path, write)


class MappedRows:
    """The rows of Arrow files, which are mapped into memory and read where they are asked for."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._maps: list[mmap.mmap] = []
        self._batches: list[Any] = []
        for path in paths:
            with path.open("rb") as file:
                self._maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            for batch in pa.ipc.open_stream(pa.BufferReader(pa.py_buffer(self._maps[-1]))):
                self._batches.append(batch)  # of which the head was read
                if len(self._batches) % _BATCHES == 0:
                    self.release()
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])
        self._taken = 0

    def __len__(self) -> int:
        return int(self._starts[-1])

    def each(self, name: str, value: Callable[[Any], Any]) -> Any:
        """An array of what `value` makes of a column of all rows; it gets the Arrow array of some of them."""
        found = None
        for number, (start, batch) in enumerate(zip(self._starts, self._batches, strict=False)):
            values = np.asarray(value(batch.column(name)))
            if found is None:
                found = np.empty((len(self), *values.shape[1:]), values.dtype)
            found[start : start + len(values)] = values
            if number % _BATCHES == _BATCHES - 1:
                self.release()
        self.release()
        return np.empty(0, np.int64) if found is None else found

    def numbers(self, name: str) -> RowNumbers:
        """A column of numbers."""
        return cast("RowNumbers", self.each(name, np.asarray))

    def differs(self, name: str, value: str) -> Any:
        """For each row whether its column of texts has another value."""
        return self.each(name, lambda column: pc.not_equal(column, value))

    def take(self, rows: RowNumbers, names: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """The values of rows, in their order.

        Args:
            names: of columns; None for all.
        """
        batch_of = np.searchsorted(self._starts, rows, side="right") - 1
        found: list[dict[str, Any]] = [{}] * len(rows)
        for number in np.unique(batch_of):
            places = np.flatnonzero(batch_of == number)
            batch = self._batches[number] if names is None else self._batches[number].select(list(names))
            values = batch.take(pa.array(rows[places] - self._starts[number])).to_pylist()
            for place, row in zip(places, values, strict=True):
                found[place] = row
            self._taken += len(places)
            if self._taken >= _MAPPED:
                self.release()
        return found

    def release(self) -> None:
        """Give back the memory of pages that were read."""
        self._taken = 0
        for mapped in self._maps:
            mapped.madvise(mmap.MADV_DONTNEED)


class ExampleTable(Sequence[Example]):
    """More than `IN_MEMORY` examples.

    Attributes:
        file: the rows of the source.
        rows: which of them are the examples, in order.
        path: of the file.
    """

    def __init__(self, path: Path, file: MappedRows, rows: RowNumbers) -> None:
        self.path, self.file, self.rows = path, file, rows

    @classmethod
    def build(cls, key: str, converted: Iterable[tuple[Row, Example | str]]) -> ExampleTable:
        """All rows of a source, those without an example too.

        Args:
            key: of `table_key`; the rows are read only where there is no table of this name.
            converted: each row with its example, or why it has none.
        """
        path = cache_folder() / f"{key}.arrow"
        write_once(path, lambda temporary: _write(temporary, converted))
        file = MappedRows([path])
        return cls(path, file, np.arange(len(file), dtype=np.int32))

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        if isinstance(index, slice):
            return self.chosen(self.rows[index])
        place = range(len(self))[operator.index(index)]
        return example_of(self.file.take(self.rows[place : place + 1])[0])

    def __iter__(self) -> Iterator[Example]:
        for start in range(0, len(self), _CHUNK):
            yield from map(example_of, self.file.take(self.rows[start : start + _CHUNK]))

    def chosen(self, rows: RowNumbers) -> Sequence[Example]:
        """The examples of rows of the file, as objects where they are few."""
        self.file.release()
        table = ExampleTable(self.path, self.file, rows)
        return list(table) if len(rows) <= IN_MEMORY else table

    @property
    def tasks(self) -> list[str]:
        """For each row whose it is."""
        numbers: dict[str, int] = {}

        def number(column: Any) -> Any:
            encoded = column.dictionary_encode()
            of_name = [numbers.setdefault(name, len(numbers)) for name in encoded.dictionary.to_pylist()]
            return np.array(of_name)[encoded.indices]

        of_row = self.file.each("task", number)[self.rows]
        names = list(numbers)
        return [names[i] for i in of_row]

    def used(self, order: Sequence[int]) -> tuple[Sequence[Example], list[Skipped]]:
        """The examples of rows in an order, and the rows that have none, in the order of the file."""
        wanted = np.asarray(order, dtype=np.int32)
        bad = self.file.differs("problem", "")
        rows = np.sort(wanted[bad[wanted]])
        skipped = [Skipped(r["origin"], r["problem"]) for r in self.file.take(rows, ("origin", "problem"))]
        return self.chosen(wanted[~bad[wanted]]), skipped

    def without_questions(self, keys: Collection[int]) -> Sequence[Example]:
        """Without examples of which a question has one of these keys."""
        sought = np.fromiter(keys, np.int64, len(keys))

        def removed(column: Any) -> Any:
            found = np.isin(column.flatten(), sought)
            return np.bincount(np.asarray(column.value_parent_indices())[found], minlength=len(column)) > 0

        return self.chosen(self.rows[~self.file.each("keys", removed)[self.rows]])

    def without_origins(self, origins: Collection[str]) -> Sequence[Example]:
        """Without examples of these origins."""
        sought = pa.array(list(origins), pa.string())
        removed = self.file.each("origin", lambda column: pc.is_in(column, value_set=sought))
        return self.chosen(self.rows[~removed[self.rows]])

    def question_keys(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The key of each example's question."""
        first = self.file.each("keys", lambda column: pc.list_element(column, 0))
        return cast("np.ndarray[Any, np.dtype[np.int64]]", first[self.rows])

    def first_chat(self) -> Example | None:
        """The first example that is one."""
        is_chat = self.file.differs("turns", "")[self.rows]
        return self[int(np.argmax(is_chat))] if is_chat.any() else None

    def fingerprint(self) -> str:
        """sha256 over digests of what the examples say, in their order."""
        digests = self.file.each("digest", lambda column: np.asarray(column.flatten()).reshape(-1, 2))
        sha256 = hashlib.sha256()
        for start in range(0, len(self), _CHUNK):
            sha256.update(digests[self.rows[start : start + _CHUNK]].tobytes())
        return sha256.hexdigest()


def _write(path: Path, converted: Iterable[tuple[Row, Example | str]]) -> None:
    bar = tqdm(converted, "Reading", unit=" rows", unit_scale=True, leave=False, mininterval=1, disable=None)
    rows = iter(bar)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, _SCHEMA) as writer:
        while chunk := list(islice(rows, _CHUNK)):
            values = [_values(row, example) for row, example in chunk]
            writer.write_batch(pa.RecordBatch.from_pylist(values, schema=_SCHEMA))


def _values(row: Row, example: Example | str) -> dict[str, Any]:
    if isinstance(example, str):
        texts = {**dict.fromkeys(_TEXTS, ""), "origin": row.origin, "task": row.task}
        return {**texts, "options": [], "turns": "", "problem": example, "keys": [0], "digest": [0, 0]}
    return {
        **{name: getattr(example, name) for name in _TEXTS},
        "options": example.options,
        "turns": json.dumps(example.turns) if example.turns else "",
        "problem": "",
        "keys": [question_key(question) for question in example.questions],
        "digest": struct.unpack("<2q", hashlib.blake2b(example_bytes(example), digest_size=16).digest()),
    }


def example_of(values: dict[str, Any]) -> Example:
    """The example of a row of a table."""
    turns = tuple(Turn(*turn) for turn in json.loads(values["turns"])) if values["turns"] else ()
    return Example(
        values["question"],
        values["completion"],
        values["answer"],
        sys.intern(values["task"]),
        values["origin"],
        tuple(values["options"]),
        turns,
    )


def without_questions(examples: Sequence[Example], keys: Collection[int]) -> Sequence[Example]:
    """Without examples of which a question has one of these keys."""
    if isinstance(examples, ExampleTable):
        return examples.without_questions(keys)
    return [e for e in examples if not any(question_key(question) in keys for question in e.questions)]


def without_origins(examples: Sequence[Example], origins: Collection[str]) -> Sequence[Example]:
    """Without examples of these origins."""
    if isinstance(examples, ExampleTable):
        return examples.without_origins(origins)
    return [example for example in examples if example.origin not in origins]


def first_chat(examples: Sequence[Example]) -> Example | None:
    """The first example that is a chat."""
    if isinstance(examples, ExampleTable):
        return examples.first_chat()
    return next((example for example in examples if example.turns), None)


def fingerprint_of(examples: Sequence[Example]) -> str:
    """What tells examples and their order from others; of a table by the digests of its rows."""
    return examples.fingerprint() if isinstance(examples, ExampleTable) else fingerprint(examples)


def repeated_questions(examples: Sequence[Example]) -> int:
    """How many examples have the question of another one before them."""
    if isinstance(examples, ExampleTable):
        keys = examples.question_keys()
        keys.sort()
        return int((keys[1:] == keys[:-1]).sum())
    return len(examples) - len({question_key(example.question) for example in examples})
