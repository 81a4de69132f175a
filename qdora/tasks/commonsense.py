"""The eight commonsense tasks in LLM-Adapters' format, one by one or mixed.

Source: LLM-Adapters, arXiv:2304.01933, `dataset/` and commonsense_evaluate.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby, zip_longest
from pathlib import Path

from qdora.config import DatasetConfig
from qdora.data.readers import require
from qdora.data.rows import Example, Row
from qdora.errors import InputError, suggest
from qdora.tasks.base import LlmAdaptersTask, Task, read_llm_adapters


def _task(name: str, words: Sequence[str], paper: str, licence: str) -> LlmAdaptersTask:
    return LlmAdaptersTask(
        name, f"LLM-Adapters (arXiv:2304.01933); {paper}", licence, kind="choice", words=tuple(words)
    )


# Five words although most questions have four choices: the published rule looks for all five.
_ANSWERS = [f"answer{i}" for i in range(1, 6)]

COMMONSENSE = (
    _task("boolq", ["true", "false"], "arXiv:1905.10044", "CC BY-SA 3.0"),
    _task("piqa", ["solution1", "solution2"], "arXiv:1911.11641", "AFL-3.0"),
    _task("social_i_qa", _ANSWERS, "arXiv:1904.09728", "CC BY 4.0"),
    _task("hellaswag", [f"ending{i}" for i in range(1, 5)], "arXiv:1905.07830", "MIT"),
    _task("winogrande", ["option1", "option2"], "arXiv:1907.10641", "CC BY 4.0"),
    _task("ARC-Easy", _ANSWERS, "arXiv:1803.05457", "CC BY-SA 4.0"),
    _task("ARC-Challenge", _ANSWERS, "arXiv:1803.05457", "CC BY-SA 4.0"),
    _task("openbookqa", _ANSWERS, "arXiv:1809.02789", "Apache-2.0"),
)
_BY_NAME = {task.name: task for task in COMMONSENSE}


class Mixture(Task):
    """Several commonsense tasks in one training set, scored one by one."""

    required = ("path",)
    optional = ("tasks",)
    names_examples = False

    def check(self, config: DatasetConfig) -> None:
        """As `Task.check`.

        Raises: InputError: as there, or an unknown name in `tasks`.
        """
        super().check(config)
        for name in config.tasks:
            if name not in _BY_NAME:
                raise InputError(f"tasks: got {name!r}; {suggest(name, _BY_NAME)}")

    def rows(self, config: DatasetConfig) -> Sequence[Row]:
        """The rows of FOLDER/TASK/SPLIT.json of one task after the other."""
        folder = Path(str(config.path))
        require(folder, "a folder with one folder for each task, ROOT/TASK/{train,test}.json")
        by_task = {name: read_llm_adapters(folder, name, config.split) for name in config.tasks or _BY_NAME}
        return [replace(row, task=name) for name, rows in by_task.items() for row in rows]

    def order(self, config: DatasetConfig, rows: Sequence[Row]) -> Sequence[int]:
        """Train: all shuffled.  Test: from each task in turn, so that a limit takes equally from each."""
        if config.split == "train":
            return super().order(config, rows)
        by_task = [list(of_task) for _, of_task in groupby(range(len(rows)), lambda i: rows[i].task)]
        return [i for turn in zip_longest(*by_task) for i in turn if i is not None]

    def example(self, config: DatasetConfig, row: Row) -> Example:
        """As the row's own task has it."""
        return _BY_NAME[row.task].example(config, row)


MIXTURE = Mixture(
    "commonsense", provenance="LLM-Adapters (arXiv:2304.01933)", licence="as its tasks", kind="choice"
)
