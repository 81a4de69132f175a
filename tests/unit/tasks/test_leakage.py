"""Leakage: test questions found in the training set, in made-up and in real data."""

from __future__ import annotations

import pytest

from qdora.config import ColumnsConfig, DatasetConfig
from qdora.data.rows import normalize
from qdora.tasks import load_dataset
from qdora.tasks.prepare import remove_leaked

INSTRUCTION = ColumnsConfig(question="instruction", completion="output", answer="answer")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Sara's team won 12 games.", "Sara 's  team\nWON 12 games ."),
        ("It costs 6,359 yen?", "it costs 6359 yen"),
        ("ﬁve “red” apples…", 'five "red" apples'),
        ("a well-known_fact", "a well known fact"),
        ("Straße", "STRASSE"),
    ],
)
def test_alike(one, other):
    """Catches: a leaked question kept because of case, spacing, punctuation or Unicode form."""
    assert normalize(one) == normalize(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is 5 - 3?", "What is 5 + 3?"),
        ("What is -5?", "What is 5?"),
        ("What is 2.5 kg?", "What is 25 kg?"),
        ("Is 3 < 4?", "Is 3 > 4?"),
        ("3 apples", "4 apples"),
    ],
)
def test_different(one, other):
    """Catches: different problems removed because their operators or numbers were taken for punctuation."""
    assert normalize(one) != normalize(other)


def test_remove(example):
    """Catches: a wrong count, the order lost, the test set shortened instead."""
    train = [example(q, origin=f"f:{i}") for i, q in enumerate(["a b", "c", "A  b!", "d"])]
    kept, removed = remove_leaked(train, [example("a b?"), example("zzz")])
    assert [e.origin for e in kept] == ["f:1", "f:3"]
    assert removed == 2


@pytest.mark.parametrize(
    ("test_set", "word_for_word", "found", "removed"),
    [("AddSub", 316, 334, 413), ("MultiArith", 491, 491, 480)],
)
def test_real_math(shared_data, test_set, word_for_word, found, removed):
    """Catches: a normalization that no longer finds the published leaks."""

    def load(path):
        file = str(shared_data / "math" / path)
        return load_dataset(DatasetConfig(source="file", path=file, columns=INSTRUCTION), "skip")

    train, test = load("math_data.json"), load(f"{test_set}/test.json").examples
    assert len(train.examples) == 3257
    assert [s.reason for s in train.skipped] == ["column 'output' is empty"] * 3
    raw = {e.question for e in train.examples}
    normalized = {normalize(e.question) for e in train.examples}
    assert sum(e.question in raw for e in test) == word_for_word
    assert sum(normalize(e.question) in normalized for e in test) == found
    kept, count = remove_leaked(train.examples, test)
    assert count == removed
    assert not {e.question for e in kept} & {e.question for e in test}


@pytest.mark.parametrize(
    ("task", "train_rows", "test_rows", "removed"),
    [("ARC-Easy", 2251, 2376, 2), ("boolq", 9427, 3270, 1), ("openbookqa", 4957, 500, 0)],
)
def test_real_commonsense(shared_data, task, train_rows, test_rows, removed):
    """Catches: rows of the published files lost on the way; choices left out of the comparison."""

    def load(split):
        root = str(shared_data / "commonsense")
        config = DatasetConfig(source="commonsense", path=root, tasks=(task,), split=split)
        return load_dataset(config, "stop").examples

    train, test = load("train"), load("test")
    assert (len(train), len(test)) == (train_rows, test_rows)
    assert remove_leaked(train, test)[1] == removed


def test_real_gsm8k(shared_data):
    """Catches: a published solution that our rules cannot read."""
    config = DatasetConfig(source="gsm8k", path=str(shared_data / "math" / "gsm8k"))
    examples = load_dataset(config, "stop").examples
    assert len(examples) == 7473
    assert all(float(e.answer) is not None and "<<" not in e.completion for e in examples)
