"""The eight commonsense tasks in LLM-Adapters' format, one by one or mixed.

The published format lists the options in the instruction and asks for a label:

    Please choose the correct answer to the question: QUESTION

    Answer1: TEXT Answer2: TEXT

    Answer format: answer1/answer2

With `answers: text` the question stands alone, and an option's text answers it.

Source: LLM-Adapters, arXiv:2304.01933, `dataset/` and commonsense_evaluate.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby, zip_longest
from pathlib import Path

from qdora.config import DatasetConfig
from qdora.data.readers import require
from qdora.data.rows import BadRowError, Example, Row, Rows
from qdora.errors import InputError, suggest
from qdora.tasks.base import LlmAdaptersTask, Option, Task, read_llm_adapters

_REQUEST = re.compile(r"Please (?:choose|answer) [^:\n]*:\s*")
_FORMAT = "Answer format:"
_COMPLETION = "the correct answer is {}"


class CommonsenseTask(LlmAdaptersTask):
    """A choice task in LLM-Adapters' format."""

    optional = ("answers",)

    def example(self, config: DatasetConfig, row: Row) -> Example:
        """As published, or the bare question with the text of its correct option.

        Raises: BadRowError: as of the base class; `answers: text`, and the instruction is not in the
            published format, or the answer is none of its options.
        """
        example = super().example(config, row)
        if config.answers == "label":
            return example
        stem, options = self._parts(example.question)
        if example.answer not in options:
            raise BadRowError(f"the answer is {example.answer!r}; {suggest(example.answer, options)}")
        text = options[example.answer]
        return replace(example, question=stem, completion=text, answer=text, options=tuple(options.values()))

    def options(self, example: Example) -> Sequence[Option]:
        """The labels of the question's answer format, each with the published completion; or the texts.

        Raises: InputError: the question does not end in an answer format, or lacks the gold answer there.
        """
        if example.options:
            return super().options(example)
        try:
            labels = self._labels(example.question)
        except BadRowError as error:
            raise InputError(f"{example.origin}: {error}") from None
        if example.answer not in labels:
            raise InputError(f"{example.origin}: the answer is {example.answer!r}; allowed: {labels}")
        return [Option(label, _COMPLETION.format(label)) for label in labels]

    def _labels(self, instruction: str) -> list[str]:
        """What the instruction's last line allows as an answer.

        Raises: BadRowError: there is no such line, or it has a label that is none of the task's.
        """
        _, found, labels = instruction.rpartition(_FORMAT)
        listed = labels.strip().split("/")
        if not found or not set(listed) <= set(self.words):
            ending = f"'{_FORMAT} {'/'.join(self.words[:2])}'"
            raise BadRowError(
                f"an instruction of {self.name!r} ends in {ending} or alike, this in {instruction[-60:]!r}"
            )
        return listed

    def _parts(self, instruction: str) -> tuple[str, Mapping[str, str]]:
        """The question alone, and the text of each option by its label.

        Raises: BadRowError: the instruction is not in the published format.
        """
        labels = self._labels(instruction)
        body = instruction.rpartition(_FORMAT)[0]
        # The options of boolq are their own texts, and are not listed.
        listed = [label for label in labels if label[-1].isdigit()]
        marks = "".join(rf"\s+{label.capitalize()}:(.*?)" for label in listed)
        found = re.fullmatch(rf"{_REQUEST.pattern}(.*?){marks}\s*", body, re.DOTALL)
        stem, *texts = (part.strip() for part in found.groups()) if found else ("",)
        if not stem or not all(texts):
            marked = " ".join(f"{label.capitalize()}: TEXT" for label in listed)
            raise BadRowError(
                f"the instruction is not of the form 'Please choose ...: QUESTION {marked}', "
                f"of which answers: text takes the parts: {body[:60]!r}"
            )
        return stem, dict(zip(labels, texts or labels, strict=True))


def _task(name: str, words: Sequence[str], paper: str, licence: str) -> CommonsenseTask:
    return CommonsenseTask(
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
    optional = ("tasks", "answers")
    names_examples = False

    def check(self, config: DatasetConfig) -> None:
        """As `Task.check`.

        Raises: InputError: as there, or an unknown name in `tasks`.
        """
        super().check(config)
        for name in config.tasks:
            if name not in _BY_NAME:
                raise InputError(f"tasks: got {name!r}; {suggest(name, _BY_NAME)}")

    def rows(self, config: DatasetConfig) -> Rows:
        """The rows of FOLDER/TASK/SPLIT.json of one task after the other."""
        folder = Path(str(config.path))
        require(folder, "a folder with one folder for each task, ROOT/TASK/{train,test}.json")
        by_task = {name: read_llm_adapters(folder, name, config.split) for name in config.tasks or _BY_NAME}
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
        return _BY_NAME[row.task].example(config, row)


MIXTURE = Mixture(
    "commonsense", provenance="LLM-Adapters (arXiv:2304.01933)", licence="as its tasks", kind="choice"
)
