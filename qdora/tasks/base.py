"""A task: its rows, prompts, gold answers, scorers, provenance and licence in one object."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby, islice, zip_longest
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import numpy as np

from qdora.config import AnswerKind, DatasetConfig
from qdora.data.columnar import read_hub
from qdora.data.readers import require, stream_rows
from qdora.data.rows import (
    IN_MEMORY,
    BadRowError,
    BadRows,
    Dataset,
    Example,
    Row,
    Rows,
    Skipped,
    as_text,
    raise_for_skipped,
    text_of,
)
from qdora.errors import InputError, suggest
from qdora.tasks.scoring import SCORERS, Verdict, published_gold, score_published, verdicts_of

SAMPLE = 1_000
"""Rows of a streamed source by which it is known before training."""

AS_PUBLISHED = "as in `dataset` of github.com/AGI-Edgerunners/LLM-Adapters"
"""Where files in LLM-Adapters' format are."""

NeedsGold = Literal["all", "questions", "none"]
"""`all`: a row without a gold answer is bad; `questions`: one that is no chat is; `none`: none is."""


class Option(NamedTuple):
    """An answer to choose from, and the text whose likelihood is taken for it."""

    answer: str
    text: str


@dataclass(frozen=True)
class Task:
    """One task: a subclass in a file of its own reads its rows, an instance is in the registry.

    Attributes:
        name: `source` in a configuration, and `Example.task`.
        provenance: paper and repository of the questions and of the answer rule.
        licence: of the questions.
        kind: how answers are compared; decides the scorers.
        words: `choice`: the words looked for in an output, in the published order.
        gold: where the gold answer is: in a column of its own, or in the worked `solution`, out of
            which `Example.answer` is read.
        needs_gold: which rows of the user's own data must have one.
    """

    name: str
    provenance: str
    licence: str
    kind: AnswerKind = "numeric"
    words: tuple[str, ...] = ()
    gold: Literal["column", "solution"] = "column"
    needs_gold: NeedsGold = "questions"

    required: ClassVar[tuple[str, ...]] = ()
    """Keys of `DatasetConfig` that must be given."""
    optional: ClassVar[tuple[str, ...]] = ()
    """Further keys that may be given, besides `split`, `seed` and `limit`."""
    splits: ClassVar[tuple[str, ...]] = ("train", "test")
    """The splits; empty where the data decides."""
    split_of_files: ClassVar[bool] = True
    """Whether a split has files of its own; else it is a part of the rows, by `order`."""
    dataset: ClassVar[str] = ""
    """Id of the data set on the hub; empty where it is not there, or the configuration names it."""
    names_examples: ClassVar[bool] = True
    """Whether its examples carry its name; those of a mixture or of the user's own data do not."""

    @property
    def scorers(self) -> tuple[str, ...]:
        """Names of the scorers, the one of the headline score first."""
        return tuple(SCORERS[self.kind])

    def check(self, config: DatasetConfig) -> None:
        """Check the keys that only this task understands, before anything is read.

        Raises: InputError: a key is missing or has a value that is not allowed.
        """
        for key in self.required:
            if not getattr(config, key):
                raise InputError(f"source {self.name!r} needs a {key}")
        if self.splits and config.split not in self.splits:
            raise InputError(
                f"split {config.split!r} of source {self.name!r}; allowed: {', '.join(self.splits)}"
            )

    def answer_kind(self, config: DatasetConfig) -> AnswerKind:
        """How the answers of its examples are compared."""
        return self.kind

    def rows(self, config: DatasetConfig) -> Iterable[Row]:
        """All rows of the split's files, in their order; `Rows` where there may be too many to be held.

        Raises: InputError: the data is missing or cannot be read.
        """
        raise NotImplementedError

    def resolved(self, config: DatasetConfig, rows: Sequence[Row]) -> DatasetConfig:
        """The configuration with what its rows decide: here nothing.

        Args:
            rows: the first ones.
        Raises: InputError: the rows are of no form that the task reads.
        """
        return config

    def order(self, config: DatasetConfig, tasks: Sequence[str]) -> Sequence[int]:
        """Which rows are used, in which order: here all, `train` shuffled, `test` as in the file.

        Args:
            tasks: for each row whose it is, where a source mixes tasks.
        """
        return shuffled(len(tasks), config.seed) if config.split == "train" else range(len(tasks))

    def example(self, config: DatasetConfig, row: Row) -> Example:
        """Question, text to train on and gold answer of a row.

        Raises: BadRowError: the row cannot be used.
        """
        raise NotImplementedError

    def load(self, config: DatasetConfig, bad_rows: BadRows) -> Dataset:
        """The examples of a split: the first `limit` usable rows in the task's order.

        Of a source that is streamed these are the usable ones of its first rows, in their order.

        All rows of the split are checked, also those behind the limit, in the order of the file: a bad
        row shows before the first long run, and the one that is named is the first in the file.

        Raises:
            InputError: as `rows` and `order`.
            DataError: a row is bad, and `bad_rows` is `stop`.
        """
        source = self.rows(config)
        if config.streaming:
            source = list(islice(source, SAMPLE))
        others = iter(source)
        rows = list(islice(others, IN_MEMORY + 1))
        config = self.resolved(config, rows)
        if len(rows) > IN_MEMORY and isinstance(source, Rows):
            return self._load_large(config, bad_rows, source.identity, chain(rows, others))
        rows += others
        order = range(len(rows)) if config.streaming else self.order(config, [row.task for row in rows])
        converted: dict[int, Example] = {}
        skipped: list[Skipped] = []
        for i in sorted(order):
            example = self._convert(config, rows[i])
            if isinstance(example, Example):
                converted[i] = example
            else:
                skipped.append(Skipped(rows[i].origin, example))
        raise_for_skipped(skipped, bad_rows)
        return Dataset([converted[i] for i in order if i in converted][: config.limit], skipped)

    def stream(self, config: DatasetConfig) -> Callable[[], Iterator[Example | Skipped]]:
        """What reads the examples of a split one after the other, and the rows that have none.

        Raises: InputError: as `rows` and `resolved`; what is returned raises it as rows are read.
        """
        rows = self.rows(config)
        config = self.resolved(config, list(islice(rows, SAMPLE)))

        def read() -> Iterator[Example | Skipped]:
            for row in rows:
                example = self._convert(config, row)
                yield example if isinstance(example, Example) else Skipped(row.origin, example)

        return read

    def _load_large(
        self, config: DatasetConfig, bad_rows: BadRows, identity: Sequence[str], rows: Iterator[Row]
    ) -> Dataset:
        """As `load`, by a table of all rows on the disk; they are read where it is not there yet."""
        from qdora.data.table import ExampleTable, table_key  # with pyarrow

        # Of questions all must have one in either case, so a file that is divided is read once.
        questions = config.format == "question_answer" and self.needs_gold == "all"
        needs_gold = "questions" if questions else self.needs_gold
        same_rows = {"seed", "limit", "held_out"} | (set() if self.split_of_files else {"split"})
        key = table_key(self.name, needs_gold, *identity, config.model_dump_json(exclude=same_rows))
        table = ExampleTable.build(key, ((row, self._convert(config, row)) for row in rows))
        examples, skipped = table.used(self.order(config, table.tasks))
        raise_for_skipped(skipped, bad_rows)
        return Dataset(examples[: config.limit], skipped)

    def _convert(self, config: DatasetConfig, row: Row) -> Example | str:
        """A row's example, or why it has none."""
        try:
            return self.example(config, row)
        except BadRowError as error:
            return str(error)

    def options(self, example: Example) -> Sequence[Option]:
        """What a choice task's question can be answered with: its own options, else the task's words.

        Raises: InputError: they cannot be found, or the gold answer is not among them.
        """
        return [Option(word, word) for word in example.options or self.words]

    def score(self, output: str, example: Example) -> dict[str, Verdict]:
        """The verdict of each scorer on an output, the headline scorer first.

        Args:
            output: what the model generated, without the prompt.
            example: the question's gold answer and reference solution.
        """
        worked = self.gold == "solution"
        answer = example.completion if worked else example.answer
        words = longest_first(example.options) if example.options else self.words
        verdicts = verdicts_of(output, answer, self.kind, words)
        if "published" in verdicts and not worked:
            gold = published_gold(example.answer, example.completion)
            verdicts["published"] = score_published(output, gold)
        return verdicts


def longest_first(words: Iterable[str]) -> tuple[str, ...]:
    """The different words in the order in which they are looked for: not `answer1` in `answer10`."""
    return tuple(sorted(set(words), key=lambda word: (-len(word), word)))


class LlmAdaptersTask(Task):
    """A task in LLM-Adapters' format: JSON arrays of instruction, input, output and answer.

    Source: arXiv:2304.01933, `dataset/TASK/{train,test}.json`.
    """

    required = ("path",)

    def rows(self, config: DatasetConfig) -> Rows:
        """The rows of FOLDER/TASK/SPLIT.json, or of a file, which is then the split."""
        path = Path(str(config.path))
        return stream_rows(path) if path.is_file() else read_llm_adapters(path, self.name, config.split)

    def example(self, config: DatasetConfig, row: Row) -> Example:
        """The instruction with its input, the output, the answer."""
        question = question_of(row, "instruction")
        return Example(question, text_of(row, "output"), text_of(row, "answer"), self.name, row.origin)


@dataclass(frozen=True)
class Mixture(Task):
    """Several tasks in LLM-Adapters' format in one training set, scored one by one.

    Attributes:
        members: the tasks; all of one kind.
    """

    members: tuple[LlmAdaptersTask, ...] = ()

    required = ("path",)
    optional: ClassVar[tuple[str, ...]] = ("tasks",)
    names_examples = False

    def _member(self, name: str) -> LlmAdaptersTask:
        by_name = {task.name: task for task in self.members}
        if name not in by_name:
            raise InputError(f"tasks: got {name!r}; {suggest(name, by_name)}")
        return by_name[name]

    def check(self, config: DatasetConfig) -> None:
        """As `Task.check`.

        Raises: InputError: as there, or an unknown name in `tasks`.
        """
        super().check(config)
        for name in config.tasks:
            self._member(name)

    def rows(self, config: DatasetConfig) -> Rows:
        """The rows of FOLDER/TASK/SPLIT.json of one task after the other."""
        folder = Path(str(config.path))
        require(
            folder, f"a folder with one folder for each task, ROOT/TASK/{{train,test}}.json, {AS_PUBLISHED}"
        )
        names = config.tasks or [task.name for task in self.members]
        by_task = {name: read_llm_adapters(folder, name, config.split) for name in names}
        return Rows(
            lambda: (replace(row, task=name) for name, rows in by_task.items() for row in rows),
            [part for rows in by_task.values() for part in rows.identity],
        )

    def order(self, config: DatasetConfig, tasks: Sequence[str]) -> Sequence[int]:
        """Train: all shuffled.  Test: from each task in turn, so that a limit takes equally from each."""
        if config.split == "train":
            return super().order(config, tasks)
        by_task = [list(of_task) for _, of_task in groupby(range(len(tasks)), lambda i: tasks[i])]
        return [i for turn in zip_longest(*by_task) for i in turn if i is not None]

    def example(self, config: DatasetConfig, row: Row) -> Example:
        """As the row's own task has it."""
        return self._member(row.task).example(config, row)


class HeldOutTask(Task):
    """A data set without a published split, from the hub or a local copy: its shuffled end is the test set.

    A subclass has the hub's id in `dataset`, the columns that it reads, and in `rows_held_out` the size of
    that end; the key `held_out` replaces it where given.
    """

    optional = ("path", "held_out")
    columns: ClassVar[tuple[str, ...]]
    rows_held_out: ClassVar[int]
    split_of_files = False

    def rows(self, config: DatasetConfig) -> Rows:
        """The hub's rows, or those of a local copy."""
        if config.path is None:
            return read_hub(self.dataset, None, "train", list(self.columns))
        return stream_rows(Path(config.path), "train")

    def order(self, config: DatasetConfig, tasks: Sequence[str]) -> Sequence[int]:
        """All rows shuffled; `test` is the end of them."""
        held_out = config.held_out or self.rows_held_out
        return held_out_split(len(tasks), config, held_out, config.path or self.dataset)


def read_llm_adapters(folder: Path, task: str, split: str) -> Rows:
    """The rows of FOLDER/TASK/SPLIT.json.

    Raises: InputError: a folder or the file is missing.
    """
    require(folder / task, f"the folder of task {task!r}, {AS_PUBLISHED}")
    file = folder / task / f"{split}.json"
    require(file, f"the {split} set of task {task!r}, {AS_PUBLISHED}")
    return stream_rows(file)


def question_of(row: Row, column: str) -> str:
    """The question; an instruction's input follows it on a new line.

    Raises: BadRowError: the question is missing or empty, or the input is not text.
    """
    question = text_of(row, column)
    extra = as_text(row.values.get("input"), "input").strip() if column == "instruction" else ""
    return f"{question}\n{extra}" if extra else question


def instruction_of(row: Row) -> str:
    """An Alpaca instruction; an input follows it under a heading of its own.

    Raises: BadRowError: the instruction is missing or empty, or the input is not text.
    """
    question = text_of(row, "instruction")
    given = as_text(row.values.get("input"), "input").strip()
    return f"{question}\n\n### Input:\n{given}" if given else question


def shuffled(count: int, seed: int) -> Sequence[int]:
    """The order into which `datasets.Dataset.shuffle(seed)` brings `count` rows."""
    # As an array: a list of a million numbers takes 40 MB.
    return array("q", np.random.default_rng(seed).permutation(count).tobytes())


def held_out_split(count: int, config: DatasetConfig, held_out: int, where: str) -> Sequence[int]:
    """The shuffled rows; with `held_out`, `test` is the last so many of them and `train` the others.

    Args:
        where: names the data in errors.
    Raises: InputError: `held_out` is not smaller than the number of rows, or the split is neither
        `train` nor `test`.
    """
    order = shuffled(count, config.seed)
    if held_out == 0:
        return order
    if held_out >= count:
        raise InputError(f"{where}: held_out {held_out} leaves nothing to train on; there are {count} rows")
    if config.split not in ("train", "test"):
        raise InputError(f"{where}: split {config.split!r} with held_out {held_out}; allowed: train, test")
    return order[-held_out:] if config.split == "test" else order[:-held_out]
