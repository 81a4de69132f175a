"""Examples that stand before every question."""

from __future__ import annotations

from typing import Any

import pytest

from qdora.config import RunConfig
from qdora.errors import InputError
from qdora.tasks import load_dataset
from qdora.tasks.prepare import load_test, load_training
from qdora.tasks.shots import draw_shots


def row(i: int) -> dict[str, str]:
    return {"question": f"What is {i} + 1?", "answer": f"The answer is {i + 1}."}


@pytest.fixture
def config(write_jsonl: Any) -> RunConfig:
    """Twenty training rows, three of them test questions, one too long."""
    train = [row(i) for i in range(20)]
    train[5] = {**train[5], "answer": "1 " * 200}
    respelled = {"question": "what is  3 + 1", "answer": "4"}
    test = [row(1), respelled, row(7), row(99)]
    return RunConfig.model_validate(
        {
            "model": {"path": "none"},
            "data": {
                "train": {"source": "file", "path": str(write_jsonl(train, "train.jsonl")), "name": "sums"},
                "test": {
                    "source": "file",
                    "path": str(write_jsonl(test, "test.jsonl")),
                    "split": "test",
                    "name": "sums",
                },
                "max_length": 100,
                "bad_rows": "skip",
            },
            "training": {"max_steps": 1},
            "evaluation": {"shots": 16},
            "output": {"dir": "runs/unused"},
        }
    )


def shots(config: RunConfig, tokenizer: Any, **evaluation: int) -> list[str]:
    changed = config.evaluation.model_copy(update=evaluation)
    scored = load_dataset(config.data.test, "stop").examples[3:]
    drawn = draw_shots(config.model_copy(update={"evaluation": changed}), tokenizer, scored)
    return [example.question for example in drawn["sums"]]


def test_they_come_from_what_is_trained_on(config: RunConfig, tokenizer: Any) -> None:
    """Catches: a test question with its answer before itself; an example that training leaves out."""
    everything = shots(config, tokenizer)
    trained = {row(i)["question"] for i in range(20) if i not in (1, 3, 5, 7)}
    assert len(everything) == 16
    assert set(everything) == trained
    with pytest.raises(InputError, match=r"evaluation\.shots 17: .* has 16 examples that fit into"):
        shots(config, tokenizer, shots=17)


def test_validation_examples_are_no_shots(config: RunConfig, tokenizer: Any) -> None:
    """Catches: a question of the validation set, on which a grid is chosen, answered before itself."""
    data = config.data.model_copy(update={"validation": 6})
    config = config.model_copy(update={"data": data})
    test = load_test(data, tokenizer).examples
    left_out = {example.question for example in load_training(data, test).validation}
    with pytest.raises(InputError, match=r"evaluation\.shots 16: .* has (\d|1[0-4]) examples"):
        shots(config, tokenizer)
    drawn = shots(config, tokenizer, shots=8)
    assert left_out
    assert left_out.isdisjoint(drawn)


def test_a_seed_decides_choice_and_order(config: RunConfig, tokenizer: Any) -> None:
    """Catches: other shots at every evaluation, or the same for all seeds; the file's order."""
    three = shots(config, tokenizer, shots=3)
    assert shots(config, tokenizer, shots=3) == three
    assert shots(config, tokenizer, shots=5)[:3] == three
    assert shots(config, tokenizer, shots=3, shots_seed=1) != three
    assert shots(config, tokenizer) != sorted(shots(config, tokenizer))


def test_none_where_none_are_asked_for(config: RunConfig, tokenizer: Any) -> None:
    """Catches: training data read for an evaluation that does not need it."""
    data = config.data.model_copy(
        update={"train": config.data.train.model_copy(update={"path": "missing.jsonl"})}
    )
    without = config.model_copy(
        update={"data": data, "evaluation": config.evaluation.model_copy(update={"shots": 0})}
    )
    assert draw_shots(without, tokenizer, load_dataset(config.data.test, "stop").examples) == {}


def test_a_task_has_its_own(config: RunConfig, tokenizer: Any, write_json: Any) -> None:
    """Catches: true-or-false questions shown before a choice of solutions; a task without training examples
    of its own left without any."""
    folder = write_json(_rows("boolq", 4), "c/boolq/train.json").parent.parent
    write_json(_rows("piqa", 4), "c/piqa/train.json")
    for task in ("boolq", "piqa", "hellaswag"):
        write_json(_rows(task, 1, first=9), f"c/{task}/test.json")
    base = {"source": "commonsense", "path": str(folder)}
    data = config.data.model_copy(
        update={
            "train": config.data.train.model_validate({**base, "tasks": ("boolq", "piqa")}),
            "test": config.data.test.model_validate(
                {**base, "tasks": ("boolq", "piqa", "hellaswag"), "split": "test"}
            ),
        }
    )
    test = load_dataset(data.test, "stop").examples
    evaluation = config.evaluation.model_copy(update={"shots": 3})
    drawn = draw_shots(config.model_copy(update={"data": data, "evaluation": evaluation}), tokenizer, test)
    assert {task: {example.task for example in of} for task, of in drawn.items()} == {
        "boolq": {"boolq"},
        "piqa": {"piqa"},
        "hellaswag": {"boolq", "piqa"},
    }
    assert {len(of) for of in drawn.values()} == {3}


def _rows(task: str, count: int, first: int = 0) -> list[dict[str, str]]:
    return [
        {"instruction": f"{task} {i}", "output": "the correct answer is true", "answer": "true"}
        for i in range(first, first + count)
    ]
