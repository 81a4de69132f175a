"""The published format of the commonsense tasks, and its parts with `answers: text`."""

from __future__ import annotations

from typing import Any

import pytest

from qdora.config import DataConfig, DatasetConfig
from qdora.data.rows import fingerprint
from qdora.errors import DataError, InputError
from qdora.tasks import check_data, load_dataset, task_for

CHOOSE = "Please choose the correct answer to the question: "
PUBLISHED: dict[str, tuple[str, str, str, list[str]]] = {
    "boolq": (
        "Please answer the following question with true or false, question: is ice: cold water?\n\n"
        "Answer format: true/false",
        "true",
        "is ice: cold water?",
        ["true", "false"],
    ),
    "piqa": (
        "Please choose the correct solution to the question: Dry a cup.\n\nSolution1: Use a towel \n\n"
        "Solution2: Use: soup.\n\nAnswer format: solution1/solution2",
        "solution1",
        "Dry a cup.",
        ["Use a towel", "Use: soup."],
    ),
    "social_i_qa": (
        f"{CHOOSE}Kim sang. Why?\n\nAnswer1: for joy Answer2: to eat Answer3: to rest\n\n"
        "Answer format: answer1/answer2/answer3",
        "answer3",
        "Kim sang. Why?",
        ["for joy", "to eat", "to rest"],
    ),
    "hellaswag": (
        "Please choose the correct ending to complete the given sentence: Running: [title] A dog\n\n"
        "Ending1: barks. Ending2: [step] Sit. Ending3: runs. Ending4: flies.\n\n"
        "Answer format: ending1/ending2/ending3/ending4",
        "ending3",
        "Running: [title] A dog",
        ["barks.", "[step] Sit.", "runs.", "flies."],
    ),
    "winogrande": (
        "Please choose the correct answer to fill in the blank to complete the given sentence: The cup hit "
        "the table and _ broke.\n\nOption1: cup Option2: table Answer format: option1/option2",
        "option1",
        "The cup hit the table and _ broke.",
        ["cup", "table"],
    ),
    "ARC-Easy": (
        f"{CHOOSE}What melts?\n\nAnswer1: ice Answer2: iron at 20: no Answer3: air Answer4: fire "
        "Answer5: none\n\nAnswer format: answer1/answer2/answer3/answer4/answer5",
        "answer1",
        "What melts?",
        ["ice", "iron at 20: no", "air", "fire", "none"],
    ),
}


def row(task: str, **changes: str) -> dict[str, str]:
    instruction, answer, *_ = PUBLISHED[task]
    return {
        "instruction": instruction,
        "input": "",
        "output": f"the correct answer is {answer}",
        "answer": answer,
    } | changes


def load(path: Any, task: str, answers: str = "text", bad_rows: Any = "stop") -> Any:
    config = DatasetConfig(source=task, path=str(path), split="test", answers=answers)
    return load_dataset(config, bad_rows)


@pytest.mark.parametrize("task", PUBLISHED)
def test_published_instructions_have_their_parts(task: str, write_json: Any) -> None:
    """Catches: a part of an option in the question or in the next option, a colon within an option taken for
    a mark, an option lost; the label left as the answer."""
    _, label, stem, options = PUBLISHED[task]
    path = write_json([row(task)])
    (example,) = load(path, task).examples
    assert (example.question, list(example.options)) == (stem, options)
    labels = [option.answer for option in task_for(task).options(load(path, task, "label").examples[0])]
    assert example.answer == example.completion == options[labels.index(label)]
    assert [(o.answer, o.text) for o in task_for(task).options(example)] == [(o, o) for o in options]


@pytest.mark.parametrize("task", PUBLISHED)
def test_labels_are_ranked_as_they_are_trained(task: str, write_json: Any) -> None:
    """Catches: a fifth option where a question has four; a text that training never shows."""
    instruction, label, _, options = PUBLISHED[task]
    (example,) = load(write_json([row(task)]), task, "label").examples
    found = {option.answer: option.text for option in task_for(task).options(example)}
    assert len(found) == len(options)
    assert list(found) == instruction.rpartition(": ")[2].split("/")
    assert found[label] == example.completion
    assert example.options == ()


def test_texts_count_in_the_fingerprint(write_json: Any) -> None:
    """Catches: another wrong option, so another question, under the same fingerprint."""
    one = load(write_json([row("piqa")], "a.json"), "piqa").examples
    changed = row("piqa")["instruction"].replace("Use: soup.", "Use: soap.")
    other = load(write_json([row("piqa", instruction=changed)], "b.json"), "piqa").examples
    assert one[0].question == other[0].question
    assert fingerprint(one) != fingerprint(other)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"instruction": "What melts?"}, r"ends in 'Answer format: answer1/answer2' or alike, this in 'What"),
        (
            {"instruction": row("ARC-Easy")["instruction"].replace("answer5", "answer6")},
            "or alike, this in",
        ),
        (
            {"instruction": row("ARC-Easy")["instruction"].replace("Answer3:", "Answer 3:")},
            "not of the form 'Please choose ...: QUESTION Answer1: TEXT Answer2: TEXT",
        ),
        (
            {"instruction": row("ARC-Easy")["instruction"].replace("Please choose", "Choose")},
            "not of the form",
        ),
        (
            {"instruction": row("ARC-Easy")["instruction"].replace("air ", "")},
            "not of the form",
        ),
        ({"answer": "answer7"}, "the answer is 'answer7'; did you mean"),
    ],
)
def test_a_row_in_another_format_is_bad(changes: dict[str, str], reason: str, write_json: Any) -> None:
    """Catches: an option without text, or two in one, ranked with the others."""
    path = write_json([row("ARC-Easy"), row("ARC-Easy", **changes)])
    with pytest.raises(DataError, match=reason) as caught:
        load(path, "ARC-Easy")
    assert str(path) in str(caught.value)
    assert len(load(path, "ARC-Easy", bad_rows="skip").examples) == 1
    assert len(load(path, "ARC-Easy", "label").examples) == 2  # to train on and generate, as published


def test_labels_without_a_list_cannot_be_ranked(write_json: Any) -> None:
    """Catches: options that the question does not have, or the gold answer not among them."""
    path = write_json([row("piqa", instruction="Dry a cup."), row("piqa", answer="solution3")])
    examples = load(path, "piqa", "label").examples
    with pytest.raises(InputError, match=r"data\.json:.*ends in 'Answer format: solution1/solution2'"):
        task_for("piqa").options(examples[0])
    with pytest.raises(InputError, match="the answer is 'solution3'"):
        task_for("piqa").options(examples[1])


def test_a_text_is_looked_for_as_a_word_is(write_json: Any) -> None:
    """Catches: a generated option compared with labels; `salt` found in `salt water`."""
    instruction = f"{CHOOSE}What freezes?\n\nAnswer1: salt Answer2: salt water\n\n"
    instruction += "Answer format: answer1/answer2"
    rows = [row("ARC-Easy", instruction=instruction, answer="answer2")]
    (example,) = load(write_json(rows), "ARC-Easy").examples
    score = task_for("ARC-Easy").score
    assert score("salt water", example)["first_answer_word"].correct
    assert not score("salt", example)["first_answer_word"].correct
    assert score("answer2", example)["first_answer_word"].extracted is None


def test_training_and_test_sets_have_one_form() -> None:
    """Catches: labels trained and texts asked for, and test questions that are not found among the
    training questions."""
    train = DatasetConfig(source="commonsense", path="x", tasks=("boolq",), answers="text")
    test = DatasetConfig(source="boolq", path="x", split="test")
    with pytest.raises(InputError, match=r"answers 'text' and data\.test\.answers 'label': they must agree"):
        check_data(DataConfig(train=train, test=test))
    check_data(DataConfig(train=train, test=test.model_copy(update={"answers": "text"})))
    unrelated = DatasetConfig(source="synthetic", count=3)
    check_data(DataConfig(train=unrelated, test=test.model_copy(update={"answers": "text"})))
    with pytest.raises(InputError, match="answers belong to source 'commonsense' or 'boolq'"):
        check_data(DataConfig(train=unrelated.model_copy(update={"answers": "text"}), test=test))


@pytest.mark.parametrize(("task", "count"), [("ARC-Easy", 4627), ("boolq", 12697), ("openbookqa", 5457)])
def test_every_real_row_has_its_parts(task: str, count: int, shared_data: Any) -> None:
    """Catches: what the made rows do not have."""
    found = 0
    for split in ("train", "test"):
        config = DatasetConfig(
            source=task, path=str(shared_data / "commonsense"), split=split, answers="text"
        )
        for example in load_dataset(config, "stop").examples:
            found += 1
            assert example.answer in example.options
            assert 2 <= len(example.options) <= 5
            assert "Answer" not in example.question.split(":")[-1]
    assert found == count
