"""The registry of tasks, and loading by configuration.

A new task is a file with a `Task` in this folder and a row in `TASKS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from qdora.config import AnswerKind, DataConfig, DatasetConfig, EvaluationMethod, RunConfig
from qdora.data.rows import BadRows, Dataset
from qdora.errors import InputError, suggest
from qdora.tasks.alpaca import ALPACA
from qdora.tasks.arithmetic import ARITHMETIC, ARITHMETIC_MIXTURE
from qdora.tasks.base import NeedsGold, Task
from qdora.tasks.columns import FILE, HUB
from qdora.tasks.commonsense import COMMONSENSE, MIXTURE
from qdora.tasks.gsm8k import GSM8K
from qdora.tasks.orca_math import ORCA_MATH
from qdora.tasks.synthetic import SYNTHETIC

TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        *(SYNTHETIC, ORCA_MATH, GSM8K, ALPACA, MIXTURE, ARITHMETIC_MIXTURE, FILE, HUB),
        *(*COMMONSENSE, *ARITHMETIC),
    )
}
"""Every source that a configuration can name."""


def task_for(name: str, kind: AnswerKind = "numeric") -> Task:
    """The task by which examples are scored.

    Args:
        name: `Example.task`; a name outside the registry is the user's own data.
        kind: how the answers of such data are compared; a registered task keeps its own.
    """
    task = TASKS.get(name)
    return task if task is not None and task.names_examples else replace(FILE, name=name, kind=kind)


def find_task(config: DatasetConfig) -> Task:
    """The task that a configuration names, after a check of its keys.

    Raises: InputError: an unknown source; a key is missing, has a value that is not allowed, or belongs
        to other sources.
    """
    task = TASKS.get(config.source)
    if task is None:
        raise InputError(f"unknown source {config.source!r}; {suggest(config.source, TASKS)}")
    task.check(config)
    for key, field in DatasetConfig.model_fields.items():
        names = [name for name, owner in TASKS.items() if key in (*owner.required, *owner.optional)]
        if names and task.name not in names and getattr(config, key) != field.default:
            belongs = f"{key} belong{'' if key.endswith('s') else 's'}"
            raise InputError(f"{belongs} to source {' or '.join(map(repr, names))}, not to {task.name!r}")
    return task


def check_data(config: DataConfig) -> None:
    """Check all sources and their keys before anything is loaded.

    Raises: InputError: as `find_task`; names the section. Two sets take answers of different forms.
    """
    forms = {}
    sets = {"data.train": config.train, "data.test": config.test, "data.validation": config.validation}
    for section, dataset in sets.items():
        if not isinstance(dataset, DatasetConfig):
            continue
        try:
            if "answers" in find_task(dataset).optional:
                forms[section] = dataset.answers
        except InputError as error:
            raise InputError(f"{section}: {error}") from None
    for section, answers in forms.items():
        if answers != forms.get("data.train", answers):
            # In another form a test question would not be found in the training set either.
            train = forms["data.train"]
            raise InputError(
                f"data.train.answers {train!r} and {section}.answers {answers!r}: they must agree"
            )


def check_run(config: RunConfig) -> None:
    """Check the sources of a run, and that its test set can be scored by the method that it names.

    Raises: InputError: as `check_data` and `check_method`.
    """
    check_data(config.data)
    test = config.data.test
    if test is not None:
        task = find_task(test)
        check_method(config.evaluation.method, task.name, task.answer_kind(test))


def check_method(method: EvaluationMethod, task: str, kind: AnswerKind) -> None:
    """Only a choice has options that can be ranked.

    Raises: InputError: another kind of answer is to be; the task is named.
    """
    if method != "generate" and kind != "choice":
        raise InputError(
            f"evaluation.method {method!r} ranks the options of a choice, and answers of {task!r} are "
            f"{kind}; allowed there: generate"
        )


def load_dataset(config: DatasetConfig, bad_rows: BadRows, *, needs_gold: NeedsGold = "questions") -> Dataset:
    """The examples of one split of a source, in the order in which they are used.

    Args:
        config: source, split, seed, limit.
        bad_rows: `stop` raises at a row that cannot be used, `skip` leaves it out and lists it.
        needs_gold: which rows of the user's own data must have a gold answer.
    Raises:
        InputError: as `find_task`; a file, folder or hub dataset is missing or unreadable; the held-out
            part is as large as the data; no usable row is left.
        DataError: a row cannot be used, and `bad_rows` is `stop`; names file and line.
    """
    dataset = replace(find_task(config), needs_gold=needs_gold).load(config, bad_rows)
    if not dataset.examples:
        where = f"source {config.source!r}" + (f" at {config.path}" if config.path else "")
        bad = dataset.skipped
        reason = f"{len(bad)} bad rows, the first: {bad[0]}" if bad else "it has no rows"
        raise InputError(f"{where}, split {config.split!r}: no usable row; {reason}")
    return dataset
