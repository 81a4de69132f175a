"""AddSub, MultiArith and SVAMP: both formats, scoring by value, and the real files."""

from __future__ import annotations

import pytest

from qdora.config import DatasetConfig
from qdora.errors import DataError, InputError
from qdora.tasks import TASKS, find_task, load_dataset
from qdora.tasks.base import shuffled
from qdora.tasks.prepare import remove_leaked

NAMES = ["AddSub", "MultiArith", "SVAMP"]


def instruction(i: int) -> dict[str, str]:
    return {
        "instruction": f" Sam has {i} pens and buys 1. How many? ",
        "input": "",
        "output": f"\nA: {i} + 1 = {i + 1}. The answer is {i + 1}.",
        "answer": f"{i + 1}.0",
    }


def published(**changes: object) -> dict[str, object]:
    row = {
        "ID": "chal-1",
        "Body": "Each pack costs 76 dollars. If there is a discount of 25 dollars on each pack",
        "Question": "How much is a pack?",
        "Equation": "( 76.0 - 25.0 )",
        "Answer": 51.0,
        "Type": "Subtraction",
    }
    return row | changes


def load(name: str, path: object, split: str = "test") -> list:
    return load_dataset(DatasetConfig(source=name, path=str(path), split=split), "stop").examples


@pytest.mark.parametrize("name", NAMES)
def test_llm_adapters_format(tmp_path, write_json, name):
    """Catches: a shuffled test set, another task's folder, the input or the answer column lost."""
    rows = [instruction(i) for i in range(5)]
    path = write_json(rows, f"{name}/test.json")
    write_json(rows, f"{name}/train.json")
    examples = load(name, tmp_path)
    assert examples == load(name, path)
    assert [e.answer for e in examples] == ["1.0", "2.0", "3.0", "4.0", "5.0"]
    assert examples[2].question == "Sam has 2 pens and buys 1. How many?"
    assert examples[2].completion == "A: 2 + 1 = 3. The answer is 3."
    assert {e.task for e in examples} == {name}
    assert [e.answer for e in load(name, tmp_path, "train")] == [f"{i + 1}.0" for i in shuffled(5, 42)]


def test_svamp_in_its_own_format(write_json):
    """Catches: the body without its question, a completion without the number, 51.0 spelled so."""
    path = write_json([published(), published(Equation="( 3.5 / 2.0 )", Answer="1.75")], "SVAMP.json")
    one, two = load("SVAMP", path)
    assert one.question == (
        "Each pack costs 76 dollars. If there is a discount of 25 dollars on each pack How much is a pack?"
    )
    assert (one.completion, one.answer) == ("( 76 - 25 ) = 51. The answer is 51.", "51")
    assert (two.completion, two.answer) == ("( 3.5 / 2 ) = 1.75. The answer is 1.75.", "1.75")
    assert (one.task, one.origin) == ("SVAMP", f"{path}:2")


@pytest.mark.parametrize("key", ["Question", "Equation", "Answer"])
def test_svamp_with_a_part_missing(write_json, key):
    """Catches: half a question scored, or a KeyError without the line."""
    rows = [published(), {k: v for k, v in published().items() if k != key}]
    with pytest.raises(DataError, match=rf"data\.json:10: column '{key}' is missing"):
        load("SVAMP", write_json(rows))


@pytest.mark.parametrize(("output", "correct"), [("It is 4.", True), ("4.00", True), ("It is 4.5", False)])
def test_decimal_gold_answers(write_json, output, correct):
    """Catches: a gold answer of 4.0 that only the text 4.0 meets, by value or by the published rule."""
    (example,) = load("MultiArith", write_json([instruction(3)]))
    verdicts = TASKS["MultiArith"].score(output, example)
    assert example.answer == "4.0"
    assert verdicts["normalized"].correct is correct
    assert verdicts["published"].gold == "4"


def test_missing_folder(tmp_path, write_json):
    """Catches: a task that is not there reported without what is."""
    write_json([instruction(1)], "AddSub/test.json")
    with pytest.raises(InputError, match=r"the folder of task 'SVAMP'.*holds: AddSub"):
        load("SVAMP", tmp_path)
    with pytest.raises(InputError, match="the train set of task 'AddSub'"):
        load("AddSub", tmp_path, "train")


def test_mixed_in_one_test_set(tmp_path, write_json):
    """Catches: a mixture of one task, or of tasks one after the other; examples scored under its name;
    SVAMP in its own format read as LLM-Adapters'."""
    for name in ("AddSub", "MultiArith"):
        write_json([instruction(i) for i in (1, 2)], f"{name}/test.json")
    own = {"Body": "There are 2 jars.", "Question": "How many?", "Equation": "2.0", "Answer": 2.0}
    write_json([own], "SVAMP/test.json")
    examples = load("arithmetic", tmp_path)
    assert [e.task for e in examples] == ["AddSub", "MultiArith", "SVAMP", "AddSub", "MultiArith"]
    assert examples[2].question == "There are 2 jars. How many?"
    with pytest.raises(InputError, match=r"tasks: got 'boolq'; .*allowed: .*AddSub"):
        find_task(DatasetConfig(source="arithmetic", path="x", tasks=("boolq",)))


@pytest.mark.parametrize(("name", "count", "reached"), [("AddSub", 395, 370), ("MultiArith", 600, 560)])
def test_real_files(shared_data, name, count, reached):
    """Catches: rows of the published files lost, gold answers that the worked solutions do not reach."""
    examples = load(name, shared_data / "math")
    assert len(examples) == count
    verdicts = [TASKS[name].score(example.completion, example) for example in examples]
    assert sum(verdict["normalized"].correct for verdict in verdicts) >= reached
    train = load_dataset(
        DatasetConfig(
            source="file",
            path=str(shared_data / "math" / "math_data.json"),
            columns={"question": "instruction", "completion": "output", "answer": "answer"},
        ),
        "skip",
    )
    assert remove_leaked(train.examples, examples)[1] == {"AddSub": 413, "MultiArith": 480}[name]
