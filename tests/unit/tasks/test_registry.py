"""The registry: what a new task is, and sources and keys that are refused before anything is loaded."""

from __future__ import annotations

import pytest

from qdora.config import DataConfig, DatasetConfig
from qdora.config_file import load_config
from qdora.data.rows import Example, Row
from qdora.errors import InputError
from qdora.tasks import TASKS, check_data, load_dataset, task_for
from qdora.tasks.base import Task
from qdora.tasks.prepare import prepare
from tests.unit.test_config import write


class Doubling(Task):
    """What a contributor writes: rows and examples."""

    optional = ("count",)

    def rows(self, config):
        return [Row(f"doubling[{i}]", {"i": i}) for i in range(config.count or 20)]

    def example(self, config, row):
        i = row.values["i"]
        question = f"What is twice {i if config.split == 'train' else i + 100}?"
        return Example(question, f"It is {2 * i}.", str(2 * i), self.name, row.origin)


def test_a_new_task_is_an_object_and_a_row(tokenizer, monkeypatch):
    """Catches: a list of names, a table or a check elsewhere that a new task has to enter."""
    task = Doubling("doubling", provenance="this test", licence="Apache-2.0", gold="solution")
    monkeypatch.setitem(TASKS, "doubling", task)
    config = DataConfig(
        train=DatasetConfig(source="doubling"), test=DatasetConfig(source="doubling", split="test", count=3)
    )
    data = prepare(config, tokenizer, None)
    assert (len(data.train), [example.answer for example in data.test]) == (20, ["0", "2", "4"])
    verdicts = task_for("doubling").score("The answer is 4.0", data.test[2])
    assert list(verdicts) == list(task.scorers) == ["normalized", "published", "math_verify"]
    assert verdicts["normalized"].correct
    with pytest.raises(InputError, match=r"held_out belongs to .*, not to 'doubling'"):
        load_dataset(DatasetConfig(source="doubling", held_out=3), "stop")
    with pytest.raises(InputError, match=r"unknown source 'doublin'; did you mean 'doubling'"):
        load_dataset(DatasetConfig(source="doublin"), "stop")


def test_every_task_states_where_it_comes_from():
    """Catches: a task without provenance or licence, or one under another name than its own."""
    for name, task in TASKS.items():
        assert name == task.name
        assert task.provenance
        assert task.licence


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.train.source=file"], "data.train: source 'file' needs a path"),
        (["data.train.source=hub"], "data.train: source 'hub' needs a path"),
        (["data.test.count=null"], "data.test: source 'synthetic' needs a count"),
        (
            ["data.train.tasks=[boolq]"],
            "tasks belong to source 'commonsense' or 'arithmetic', not to 'synthetic'",
        ),
        (["data.test.split=dev"], "split 'dev' of source 'synthetic'; allowed: train, test"),
        (
            ["data.test.held_out=3"],
            "held_out belongs to source 'orca_math' or 'alpaca' or 'file' or 'hub', not to",
        ),
        (["data.train={source: SVAMP}"], "data.train: source 'SVAMP' needs a path"),
        (["data.train={source: gsm8k, count: 3}"], "count belongs to source 'synthetic', not to 'gsm8k'"),
        (["data.train={source: gsm8k, columns: {question: q}}"], "columns belong to source 'file' or 'hub'"),
    ],
)
def test_an_impossible_combination_is_refused(tmp_path, overrides, message):
    """Catches: two keys that contradict each other, of which one is silently ignored."""
    config = load_config(write(tmp_path), overrides)
    with pytest.raises(InputError, match=message):
        check_data(config.data)


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("data.train.source=orca-math", "orca_math"),
        ("data.train.source=SWAMP", "SVAMP"),
        ("data.train={source: commonsense, path: x, tasks: [ARC]}", "ARC-Easy"),
    ],
)
def test_a_wrong_choice_is_answered_with_the_nearest(tmp_path, override, nearest):
    """Catches: a list of choices without the one that was meant."""
    config = load_config(write(tmp_path), [override])
    with pytest.raises(InputError) as caught:
        check_data(config.data)
    assert f"did you mean {nearest!r}? allowed: " in str(caught.value)
    assert override.rpartition("=")[2].strip("}[]").rpartition("[")[2] in str(caught.value)


def test_loading_checks_too():
    """Catches: a caller from Python whose mistyped source ends in a KeyError, or whose key does nothing."""
    with pytest.raises(InputError, match=r"unknown source 'gsm8'; did you mean 'gsm8k'\?"):
        load_dataset(DatasetConfig(source="gsm8"), "stop")
    with pytest.raises(InputError, match="count belongs to source 'synthetic'"):
        load_dataset(DatasetConfig(source="orca_math", count=3), "stop")


def test_keys_that_fit_pass():
    """Catches: a default value taken for a key that was given."""
    columns = {"question": "instruction", "completion": "output"}
    sets = [
        DatasetConfig(source="synthetic", count=3, split="test", seed=1, limit=2),
        DatasetConfig(source="orca_math", path="x", held_out=3),
        DatasetConfig(source="commonsense", path="x", tasks=("boolq", "piqa")),
        DatasetConfig(source="boolq", path="x"),
        DatasetConfig(source="AddSub", path="x", split="test"),
        DatasetConfig(source="file", path="x", name="y", columns=columns, answer_kind="text", held_out=1),
        DatasetConfig(source="hub", path="x", name="y", split="validation"),
        DatasetConfig(source="gsm8k"),
    ]
    for one in sets:
        check_data(DataConfig(train=one, test=sets[0]))
