"""The eight commonsense tasks in the LLM-Adapters format, one or mixed.

Source: LLM-Adapters, arXiv:2304.01933, `dataset/TASK/{train,test}.json`.
"""

from __future__ import annotations

from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import get_args

from qdora.config import CommonsenseTask, DatasetConfig
from qdora.data.readers import read_rows, require
from qdora.data.rows import Example, Row, text_of
from qdora.tasks.base import Candidate, Selection, candidates, shuffled
from qdora.tasks.columns import question_of


def select_commonsense(config: DatasetConfig) -> Selection:
    """Train: all tasks shuffled together.  Test: the tasks in turn, each in its file's order, so
    that a limit takes equally from each.

    Raises: InputError: the folder or a task's file is missing.
    """
    assert config.path is not None  # DatasetConfig checks it
    root = Path(config.path)
    require(root, "a folder with one folder for each task, ROOT/TASK/{train,test}.json")
    tasks: tuple[CommonsenseTask, ...] = config.tasks or get_args(CommonsenseTask)
    by_task = [_read_task(root, task, config.split) for task in tasks]
    mixed = [candidate for group in by_task for candidate in group]
    if config.split == "train":
        return Selection(mixed, shuffled(len(mixed), config.seed))
    return Selection(mixed, _in_turn([len(group) for group in by_task]))


def _read_task(root: Path, task: CommonsenseTask, split: str) -> list[Candidate]:
    require(root / task, f"the folder of task {task!r}")
    file = root / task / f"{split}.json"
    require(file, f"the {split} set of task {task!r}")
    return candidates(read_rows(file), partial(_example, task=task))


def _in_turn(sizes: list[int]) -> list[int]:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    groups = [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]
    return [i for turn in zip_longest(*groups) for i in turn if i is not None]


def _example(row: Row, task: CommonsenseTask) -> Example:
    question = question_of(row, "instruction")
    return Example(question, text_of(row, "output"), text_of(row, "answer"), task, row.origin)
