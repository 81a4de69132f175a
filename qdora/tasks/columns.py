"""The user's own data: any local file and any hub dataset, its columns mapped to their parts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from qdora.config import AnswerKind, DatasetConfig
from qdora.data.columnar import read_hub, require_columns
from qdora.data.folders import has_splits
from qdora.data.readers import READERS, stream_rows
from qdora.data.rows import BadRowError, Example, Row, Rows, text_of
from qdora.tasks.base import Task, held_out_split
from qdora.tasks.formats import FORMATS, check_format, named_columns, recognize
from qdora.tasks.scoring import gold_answer

_CHOICE = re.compile(r"\b(?:true|false|(?:answer|solution|ending|option)\d)\b")
# What tables have where a number is missing: a gold answer that every output would miss.
_NO_NUMBER = re.compile(r"[+-]?(?:nan|inf|infinity|none|null|n/a)", re.IGNORECASE)


class OwnData(Task):
    """Rows of which a configuration names the columns and the kind of answer."""

    required = ("path",)
    optional: ClassVar[tuple[str, ...]] = ("name", "format", "columns", "answer_kind", "held_out")
    names_examples = False
    split_of_files = False

    def check(self, config: DatasetConfig) -> None:
        """As `Task.check`; the columns that are named are those of the format.

        Raises: InputError: as `Task.check` and `check_format`.
        """
        super().check(config)
        check_format(config)

    def task_name(self, config: DatasetConfig) -> str:
        """Under which scores are reported: the name that the file was given, or its stem."""
        return config.name or Path(str(config.path)).stem

    def answer_kind(self, config: DatasetConfig) -> AnswerKind:
        """The configured one."""
        return config.answer_kind

    def rows(self, config: DatasetConfig) -> Rows:
        """The rows of a file, of all files in a folder, or of a split of a folder in the hub's layout."""
        return stream_rows(Path(str(config.path)), "train" if config.held_out else config.split)

    def resolved(self, config: DatasetConfig, rows: Sequence[Row]) -> DatasetConfig:
        """With the format that the rows have.

        Raises: InputError: as `recognize`.
        """
        return config.model_copy(update={"format": recognize(config, rows)})

    def order(self, config: DatasetConfig, tasks: Sequence[str]) -> Sequence[int]:
        """The shuffled rows, of which the last `held_out` are the split `test`."""
        return held_out_split(len(tasks), config, config.held_out, str(config.path))

    def example(self, config: DatasetConfig, row: Row) -> Example:
        """What the format reads; without a column of answers the gold answer is read in the completion."""
        columns, form = config.columns, config.format or "question_answer"
        question, completion, turns = FORMATS[form].parts(row, columns)
        if columns.answer:
            answer = text_of(row, columns.answer)
            if config.answer_kind == "numeric" and _NO_NUMBER.fullmatch(answer):
                raise BadRowError(f"column {columns.answer!r} holds {answer!r}, which is no number")
        else:
            is_question = form == "question_answer"
            read_in = f"column {columns.completion!r}" if is_question else "the answer that is trained"
            answer = _extract(completion, config, read_in, self._must_have_gold(is_question))
        return Example(question, completion, answer, self.task_name(config), row.origin, turns=turns)

    def _must_have_gold(self, is_question: bool) -> bool:
        return self.needs_gold == "all" or (self.needs_gold == "questions" and is_question)


class HubData(OwnData):
    """Rows of a dataset on the hub; with `held_out`, its split `train` is divided."""

    optional = (*OwnData.optional, "streaming", "shuffle_buffer")
    splits = ()

    def task_name(self, config: DatasetConfig) -> str:
        """Under which scores are reported: the last part of the id."""
        return Path(str(config.path)).name

    def rows(self, config: DatasetConfig) -> Rows:
        """The rows of the split, in the hub's order, or those of a local copy."""
        split = "train" if config.held_out else config.split
        folder = Path(str(config.path))
        if folder.is_dir() and not config.streaming and has_splits(folder, READERS):
            return stream_rows(folder, split, config.name)
        return read_hub(
            str(config.path), config.name, split, named_columns(config), streaming=config.streaming
        )

    def resolved(self, config: DatasetConfig, rows: Sequence[Row]) -> DatasetConfig:
        """As `OwnData.resolved`; a table's columns are those of all its rows.

        Raises: InputError: as `recognize`; a column of the format is missing.
        """
        config = super().resolved(config, rows)
        if rows:
            require_columns(str(config.path), named_columns(config), [str(name) for name in rows[0].values])
        return config


FILE = OwnData("file", provenance="the user's own data", licence="the user's own")
HUB = HubData("hub", provenance="a dataset on the Hugging Face hub", licence="as its page there says")


def _extract(completion: str, config: DatasetConfig, read_in: str, required: bool) -> str:
    """The gold answer that a completion states; empty where it states none and none is required."""
    if config.answer_kind == "text":
        return completion
    if config.answer_kind == "numeric":
        answer, wanted = gold_answer(completion), "number"
    else:
        found = _CHOICE.search(completion.lower())
        answer, wanted = found and found.group(), "choice such as true or answer2"
    if answer is None and required:
        raise BadRowError(
            f"no {wanted} in {read_in} to take as the gold answer; name a column in columns.answer, or set "
            "answer_kind: text"
        )
    return answer or ""
