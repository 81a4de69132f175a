"""A training set as token ids: as objects, or on the disk where its examples are too many for that.

Those of an `ExampleTable` are tokenized by several processes into the cache of `datasets`, in the order of
their file, and read where a batch asks for them.
"""

from __future__ import annotations

import hashlib
import json
import operator
import os
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from qdora.config import DataConfig, LossOn
from qdora.data.encode import special_tokens
from qdora.data.rows import Example, Skipped, raise_for_skipped
from qdora.data.table import (
    ExampleTable,
    MappedRows,
    RowNumbers,
    cache_folder,
    table_key,
    without_origins,
    write_once,
)
from qdora.data.tokenize import TokenizedExample, tokenize_chunk, tokenize_examples

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerBase

_CHUNK = 1_000
"""Examples that a process tokenizes at once."""
_OF_A_PROCESS = 10_000
"""Fewest examples for which a process is started."""


@dataclass(frozen=True)
class Tokenized:
    """A training set.

    Attributes:
        examples: as token ids.
        used: the same as texts.
        skipped: those that cannot be used.
        special_text: origin and token of those that hold the text of a special token.
    """

    examples: Sequence[TokenizedExample]
    used: Sequence[Example]
    skipped: list[Skipped]
    special_text: list[str]


def tokenize_set(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> Tokenized:
    """Tokenize a training set.

    Raises: InputError, DataError: as `tokenize_examples`.
    """
    if isinstance(examples, ExampleTable):
        return _tokenize_table(examples, tokenizer, config)
    how = _How.of(config)
    kept, skipped = tokenize_examples(
        examples, tokenizer, how.prompt, how.max_length, config.bad_rows,
        parse_special_tokens=how.parse_special_tokens, loss_on=how.loss_on,
    )  # fmt: skip
    used = without_origins(examples, {row.origin for row in skipped})
    texts = ((example.origin, "\n".join(example.texts)) for example in used)
    return Tokenized(kept, used, skipped, special_texts(texts, tokenizer))


def special_texts(texts: Iterable[tuple[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Origin and token of the texts that hold the text of a special token.

    Args:
        texts: each with its origin.
    """
    tokens = special_tokens(tokenizer)
    return [f"{origin} ({found.group()!r})" for origin, text in texts if (found := tokens.search(text))]


@dataclass(frozen=True)
class _How:
    """What of a configuration decides the tokens."""

    prompt: str
    max_length: int
    parse_special_tokens: bool
    loss_on: LossOn

    @classmethod
    def of(cls, config: DataConfig) -> _How:
        return cls(config.prompt, config.max_length, config.parse_special_tokens, config.loss_on)


class TokenTable(Sequence[TokenizedExample]):
    """Tokenized examples in Arrow files.

    Args:
        file: their rows.
        rows: which of them are used, in order.
    """

    def __init__(self, file: MappedRows, rows: RowNumbers) -> None:
        self.file, self.rows = file, rows
        self.lengths: list[int] = file.numbers("length")[rows].tolist()

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> TokenizedExample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[TokenizedExample]: ...
    def __getitem__(self, index: int | slice) -> TokenizedExample | Sequence[TokenizedExample]:
        if isinstance(index, slice):
            return TokenTable(self.file, self.rows[index])
        place = range(len(self))[operator.index(index)]
        return self._read(place, place + 1)[0]

    def __iter__(self) -> Iterator[TokenizedExample]:
        for start in range(0, len(self), _CHUNK):
            yield from self._read(start, start + _CHUNK)

    def _read(self, start: int, end: int) -> list[TokenizedExample]:
        names = ("input_ids", "prompt_length", "origin", "gaps")
        return [
            TokenizedExample(
                row["input_ids"],
                row["prompt_length"],
                row["origin"],
                tuple(zip(row["gaps"][::2], row["gaps"][1::2], strict=True)),
            )
            for row in self.file.take(self.rows[start:end], names)
        ]

    @property
    def labels(self) -> int:
        """How many tokens are trained."""
        return int(self.file.numbers("labels")[self.rows].sum())

    @property
    def has_gaps(self) -> bool:
        """Whether some token behind a prompt carries no loss."""
        prompts = int(self.file.numbers("prompt_length")[self.rows].sum())
        return self.labels < sum(self.lengths) - prompts


def lengths_of(examples: Sequence[TokenizedExample]) -> list[int]:
    """Tokens of each example."""
    if isinstance(examples, TokenTable):
        return examples.lengths
    return [len(example.input_ids) for example in examples]


def labels_of(examples: Sequence[TokenizedExample]) -> int:
    """How many tokens of all examples are trained."""
    return examples.labels if isinstance(examples, TokenTable) else sum(e.labels for e in examples)


def have_gaps(examples: Sequence[TokenizedExample]) -> bool:
    """Whether some token behind a prompt carries no loss."""
    return examples.has_gaps if isinstance(examples, TokenTable) else any(e.gaps for e in examples)


def _tokenize_table(table: ExampleTable, tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> Tokenized:
    how = _How.of(config)
    in_file = np.sort(table.rows)
    chosen = hashlib.sha256(in_file.tobytes()).hexdigest()
    key = table_key(table.path.name, chosen, json.dumps(asdict(how)), _identity(tokenizer))
    listed = cache_folder() / f"{key}.json"
    if listed.exists() and not all(Path(name).exists() for name in json.loads(listed.read_text())):
        listed.unlink()  # somebody has cleared the cache
    write_once(
        listed, lambda path: path.write_text(json.dumps(_map(table.path, in_file, tokenizer, how, key)))
    )
    tokens = MappedRows(Path(name) for name in json.loads(listed.read_text()))
    # Where a row of the table stands among the tokenized ones, which are in the order of the file.
    places = np.searchsorted(in_file, table.rows).astype(np.int32)
    bad = tokens.numbers("length") == 0
    problems = tokens.take(places[bad[places]], ("origin", "problem"))
    skipped = [Skipped(row["origin"], row["problem"]) for row in problems]
    raise_for_skipped(skipped, config.bad_rows)
    good = ~bad[places]
    special = tokens.numbers("special_length")[places[good]] > 0
    found = tokens.take(places[good][special], ("origin", "special"))
    return Tokenized(
        TokenTable(tokens, places[good]),
        table.chosen(table.rows[good]),
        skipped,
        [f"{row['origin']} ({row['special']!r})" for row in found],
    )


def _map(path: Path, rows: RowNumbers, tokenizer: PreTrainedTokenizerBase, how: _How, key: str) -> list[str]:
    """Tokenize rows of a table by several processes; the files that they wrote."""
    import datasets

    numbers = ("prompt_length", "length", "labels", "special_length")
    features = datasets.Features(
        {
            "input_ids": datasets.List(datasets.Value("int32")),
            "gaps": datasets.List(datasets.Value("int32")),
            **{name: datasets.Value("int32") for name in numbers},
            **{name: datasets.Value("string") for name in ("origin", "problem", "special")},
        }
    )
    source = datasets.Dataset.from_file(str(path))
    if len(rows) < len(source):
        source = source.select(rows, new_fingerprint=f"{key}-rows")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with _kept_environment():
        mapped = source.map(
            _TokenizeRows(tokenizer, how),
            batched=True,
            batch_size=_CHUNK,
            num_proc=max(1, min(cores, len(rows) // _OF_A_PROCESS)),
            remove_columns=source.column_names,
            features=features,
            cache_file_name=str(path.with_name(f"{key}.arrow")),
            new_fingerprint=key,
            desc="Tokenizing",
        )
    return [str(file["filename"]) for file in mapped.cache_files]


@contextmanager
def _kept_environment() -> Iterator[None]:
    """Undo what `Dataset.map` does to the environment: it puts a copy in the place of `os.environ`."""
    environment, before = os.environ, dict(os.environ)
    try:
        yield
    finally:
        os.environ = environment  # noqa: B003
        for name in {*environment} - {*before}:
            del environment[name]
        environment.update(before)


@dataclass(frozen=True)
class _TokenizeRows:
    """What the processes do with rows of an `ExampleTable`."""

    tokenizer: PreTrainedTokenizerBase
    how: _How

    def __call__(self, columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
        from qdora.data.table import example_of

        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        examples = [example_of(row) for row in rows]
        tokens = special_tokens(self.tokenizer)
        found = []
        for example, tokenized in zip(
            examples, tokenize_chunk(examples, self.tokenizer, **asdict(self.how)), strict=True
        ):
            special = tokens.search("\n".join(example.texts))
            found.append(_values(example.origin, tokenized, special.group() if special else ""))
        return {name: [row[name] for row in found] for name in found[0]}


def _values(origin: str, tokenized: TokenizedExample | str, special: str) -> dict[str, Any]:
    bad = isinstance(tokenized, str)
    example = TokenizedExample([], 0, origin) if isinstance(tokenized, str) else tokenized
    return {
        "input_ids": example.input_ids,
        "prompt_length": example.prompt_length,
        "gaps": [edge for gap in example.gaps for edge in gap],
        "length": len(example.input_ids),
        "labels": example.labels,
        "origin": origin,
        "problem": tokenized if bad else "",
        "special": special,
        "special_length": len(special),
    }


def _identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """What tells a tokenizer from others that give other tokens."""
    import tokenizers
    import transformers

    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab())
    added = {str(i): repr(token) for i, token in tokenizer.added_tokens_decoder.items()}
    special = [type(tokenizer).__name__, str(tokenizer.special_tokens_map), repr(tokenizer.init_kwargs)]
    versions = [tokenizers.__version__, transformers.__version__]
    return json.dumps([model, tokenizer.chat_template, added, special, versions])
