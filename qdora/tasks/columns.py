"""Any local file and any hub dataset, with its columns mapped to their parts."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from qdora.config import AnswerKind, ColumnsConfig, DatasetConfig
from qdora.data.readers import read_hub, read_rows
from qdora.data.rows import BadRowError, Example, Row, optional_text_of, text_of
from qdora.tasks.base import Selection, candidates, held_out_split
from qdora.tasks.gold import first_choice, last_number


def select_file(config: DatasetConfig) -> Selection:
    """The shuffled rows of a file or folder; scores are reported under `name` or the file's stem.

    Raises: InputError: it cannot be read, or has no more rows than are held out.
    """
    assert config.path is not None  # DatasetConfig checks it
    return _select(config, read_rows(Path(config.path)), config.name or Path(config.path).stem)


def select_hub(config: DatasetConfig) -> Selection:
    """The shuffled rows of a hub dataset; with `held_out`, its split `train` is divided.

    Raises: InputError: it cannot be loaded, has not the columns, or no more rows than are held out.
    """
    assert config.path is not None  # DatasetConfig checks it
    split = "train" if config.held_out else config.split
    columns = config.columns
    needed = [column for column in (columns.question, columns.completion, columns.answer) if column]
    return _select(config, read_hub(config.path, config.name, split, needed), config.path.rpartition("/")[2])


def _select(config: DatasetConfig, rows: list[Row], task: str) -> Selection:
    recipe = partial(_example, columns=config.columns, kind=config.answer_kind, task=task)
    order = held_out_split(len(rows), config.split, config.held_out, config.seed, str(config.path))
    return Selection(candidates(rows, recipe), order)


def _example(row: Row, columns: ColumnsConfig, kind: AnswerKind, task: str) -> Example:
    question = question_of(row, columns.question)
    completion = text_of(row, columns.completion)
    answer = text_of(row, columns.answer) if columns.answer else _extract(completion, kind, columns)
    return Example(question, completion, answer, task, row.origin)


def _extract(completion: str, kind: AnswerKind, columns: ColumnsConfig) -> str:
    if kind == "text":
        return completion
    answer = last_number(completion) if kind == "numeric" else first_choice(completion)
    if answer is None:
        wanted = "number" if kind == "numeric" else "choice such as true or answer2"
        raise BadRowError(
            f"no {wanted} in column {columns.completion!r} to take as the gold answer; "
            "name a column in columns.answer, or set answer_kind: text"
        )
    return answer


def question_of(row: Row, column: str) -> str:
    """The question; an instruction's input follows it on a new line.

    Raises: BadRowError: the question is missing or empty, or the input is not text.
    """
    question = text_of(row, column)
    extra = optional_text_of(row, "input") if column == "instruction" else ""
    return f"{question}\n{extra}" if extra else question
