"""The user's own data: any local file and any hub dataset, its columns mapped to their parts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from qdora.config import AnswerKind, DatasetConfig
from qdora.data.readers import read_hub, read_rows
from qdora.data.rows import BadRowError, Example, Row, text_of
from qdora.tasks.base import Task, held_out_split, question_of
from qdora.tasks.scoring import gold_answer

_CHOICE = re.compile(r"\b(?:true|false|(?:answer|solution|ending|option)\d)\b")
# What tables have where a number is missing: a gold answer that every output would miss.
_NO_NUMBER = re.compile(r"[+-]?(?:nan|inf|infinity|none|null|n/a)", re.IGNORECASE)


class OwnData(Task):
    """Rows of which a configuration names the columns and the kind of answer."""

    required = ("path",)
    optional = ("name", "columns", "answer_kind", "held_out")
    names_examples = False

    def task_name(self, config: DatasetConfig) -> str:
        """Under which scores are reported: the name that the file was given, or its stem."""
        return config.name or Path(str(config.path)).stem

    def answer_kind(self, config: DatasetConfig) -> AnswerKind:
        """The configured one."""
        return config.answer_kind

    def rows(self, config: DatasetConfig) -> Sequence[Row]:
        """The rows of a file, or of all files of one kind in a folder."""
        return read_rows(Path(str(config.path)))

    def order(self, config: DatasetConfig, rows: Sequence[Row]) -> Sequence[int]:
        """The shuffled rows, of which the last `held_out` are the split `test`."""
        return held_out_split(len(rows), config, config.held_out, str(config.path))

    def example(self, config: DatasetConfig, row: Row) -> Example:
        """The columns' texts; without a column of answers the gold answer is read in the completion."""
        columns = config.columns
        question = question_of(row, columns.question)
        completion = text_of(row, columns.completion)
        answer = text_of(row, columns.answer) if columns.answer else _extract(completion, config)
        if config.answer_kind == "numeric" and _NO_NUMBER.fullmatch(answer):
            raise BadRowError(f"column {columns.answer!r} holds {answer!r}, which is no number")
        return Example(question, completion, answer, self.task_name(config), row.origin)


class HubData(OwnData):
    """Rows of a dataset on the hub; with `held_out`, its split `train` is divided."""

    splits = ()

    def task_name(self, config: DatasetConfig) -> str:
        """Under which scores are reported: the last part of the id."""
        return str(config.path).rpartition("/")[2]

    def rows(self, config: DatasetConfig) -> Sequence[Row]:
        """The rows of the split, in the hub's order."""
        split = "train" if config.held_out else config.split
        columns = config.columns
        needed = [column for column in (columns.question, columns.completion, columns.answer) if column]
        return read_hub(str(config.path), config.name, split, needed)


FILE = OwnData("file", provenance="the user's own data", licence="the user's own")
HUB = HubData("hub", provenance="a dataset on the Hugging Face hub", licence="as its page there says")


def _extract(completion: str, config: DatasetConfig) -> str:
    if config.answer_kind == "text":
        return completion
    if config.answer_kind == "numeric":
        answer, wanted = gold_answer(completion), "number"
    else:
        found = _CHOICE.search(completion.lower())
        answer, wanted = found and found.group(), "choice such as true or answer2"
    if answer is None:
        raise BadRowError(
            f"no {wanted} in column {config.columns.completion!r} to take as the gold answer; "
            "name a column in columns.answer, or set answer_kind: text"
        )
    return answer
