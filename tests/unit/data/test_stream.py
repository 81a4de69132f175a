"""A streamed training set: every row once a pass, an order that a seed decides, the same at every resume."""

from __future__ import annotations

import json

import pytest

from qdora.config import DataConfig, DatasetConfig
from qdora.config_file import check_config
from qdora.data.rows import question_key
from qdora.data.tokenize import tokenize_examples
from qdora.errors import DataError, InputError
from qdora.tasks import load_dataset
from qdora.tasks.prepare import prepare

ROWS = 40


def worked(i):
    return {"question": f"What is {i} + 1?", "answer": f"It is {i + 1}."}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder in the hub's layout: two files of the training set, one of the test set."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    parts = {
        "data/train-00000-of-00002.jsonl": range(25),
        "data/train-00001-of-00002.jsonl": range(25, ROWS),
        "data/test-00000-of-00001.jsonl": (3, 100),
    }
    for name, numbers in parts.items():
        path = tmp_path / "mine" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(worked(i)) + "\n" for i in numbers))
    return tmp_path / "mine"


def config(folder, test=None, **settings):
    train = {"source": "hub", "path": str(folder), "streaming": True, "shuffle_buffer": 8}
    return DataConfig(train=DatasetConfig(**train | settings.pop("train", {})), test=test, **settings)


def origins(stream, steps, size=4):
    return [example.origin for step in steps for example in stream.batch(step, size)]


def test_each_row_once_a_pass_in_an_order_of_its_own(folder, tokenizer):
    """Catches: a row lost at the end of a file or of the buffer, or used twice; rows in the order of the
    files; the same order in every pass or for every seed; other tokens than those of rows in memory."""
    data = prepare(config(folder), tokenizer, None)
    first, second = origins(data.stream, range(10)), origins(data.stream, range(10, 20))
    everything = [f"{folder}[{i}]" for i in range(ROWS)]
    assert sorted(first) == sorted(second) == sorted(everything)
    assert len({tuple(order) for order in (first, second, everything)}) == 3
    places = [abs(i - int(origin[len(str(folder)) + 1 : -1])) for i, origin in enumerate(first)]
    assert sum(places) > ROWS
    other = prepare(config(folder, train={"seed": 1}), tokenizer, None)
    assert origins(other.stream, range(10)) != first
    assert other.fingerprints != data.fingerprints
    # A buffer that holds all rows.
    wide = origins(prepare(config(folder, train={"shuffle_buffer": 99}), tokenizer, None).stream, range(10))
    assert sorted(wide) == sorted(everything) != wide != everything

    held = load_dataset(DatasetConfig(source="hub", path=str(folder)), "stop").examples
    tokenized, _ = tokenize_examples(held, tokenizer, "question_answer", 512, "stop")
    expected = {tuple(example.input_ids) for example in tokenized}
    assert {tuple(e.input_ids) for step in range(10) for e in data.stream.batch(step, 4)} == expected


def test_step_alone_decides(folder, tokenizer):
    """Catches: a resumed run that sees other batches, because of what was read before."""
    steps = prepare(config(folder), tokenizer, None).stream
    uninterrupted = [origins(steps, [step]) for step in range(25)]
    assert origins(prepare(config(folder), tokenizer, None).stream, [17]) == uninterrupted[17]
    assert [origins(steps, [step]) for step in (3, 24, 0)] == [uninterrupted[i] for i in (3, 24, 0)]


def test_what_is_left_out(folder, tokenizer):
    """Catches: a test or validation question trained on; a long example that is cut, or ends the run; rows
    counted again in a second pass or by a stream that begins anew; ids that are not checked."""
    test = DatasetConfig(source="hub", path=str(folder), split="test")
    own = folder.parent / "own.jsonl"
    own.write_text(
        json.dumps({**worked(30), "question": "what IS 30+1"}) + "\n" + json.dumps(worked(31)) + "\n"
    )
    with (folder / "data" / "train-00001-of-00002.jsonl").open("a") as file:
        file.write(json.dumps({"question": "x" * 300, "answer": "1"}) + "\n")
    settings = {"test": test, "validation": {"source": "file", "path": str(own)}, "max_length": 128}
    data = prepare(config(folder, **settings, bad_rows="skip"), tokenizer, None)
    checked = []
    data.stream.check = checked.extend
    for steps in (range(38, 60), range(38)):
        used = origins(data.stream, steps, 1)
        assert (data.stream.leaked, data.stream.skipped) == (2, 1)
    assert {origin for origin, _ in checked} == {*used}
    assert sorted(used) == sorted(f"{folder}[{i}]" for i in range(ROWS) if i not in (3, 31))
    assert (data.leaked, data.leaked_validation, len(data.skipped)) == (1, 1, 1)
    counts = data.counts()
    assert (counts["train"], counts["streamed"], counts["test"]) == (None, True, 2)
    with pytest.raises(DataError, match=r"mine\[40\]: .* longer than data\.max_length 128"):
        prepare(config(folder, **settings), tokenizer, None)


def test_a_chat_that_asks_it_later_is_left_out(folder, tokenizer):
    """Catches: a stream that compares the first question of a chat alone."""
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}" + (
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    own = folder.parent / "own.jsonl"
    own.write_text(json.dumps(worked(3)) + "\n")
    for path in (folder / "data").glob("train-*"):
        asked = [json.loads(line) for line in path.read_text().splitlines()]
        said = [["Hello.", "Hi.", row["question"], row["answer"]] for row in asked]
        roles = ["user", "assistant"] * 2
        turns = [[{"role": r, "content": c} for r, c in zip(roles, s, strict=True)] for s in said]
        path.write_text("".join(json.dumps({"messages": of}) + "\n" for of in turns))
    validation = {"source": "file", "path": str(own)}
    data = prepare(config(folder, validation=validation, prompt="chat"), tokenizer, None)
    used = origins(data.stream, range(ROWS - 1), 1)
    assert sorted(used) == sorted(f"{folder}[{i}]" for i in range(ROWS) if i != 3)


def test_rows_that_change_behind_the_sample(folder, tokenizer, monkeypatch):
    """Catches: a bad row far behind that is passed over with bad_rows: stop; a stream without any usable row
    that is read for ever."""
    monkeypatch.setattr("qdora.tasks.base.SAMPLE", 5)
    with (folder / "data" / "train-00001-of-00002.jsonl").open("a") as file:
        file.write(json.dumps({"question": "", "answer": "It is 1."}) + "\n")
    stream = prepare(config(folder), tokenizer, None).stream
    with pytest.raises(DataError, match=r"mine\[40\]: column 'question' is empty"):
        origins(stream, range(10))
    stream = prepare(config(folder, bad_rows="skip"), tokenizer, None).stream
    stream._excluded = {question_key(worked(i)["question"]) for i in range(ROWS)}
    with pytest.raises(InputError, match="no row of the stream can be used"):
        stream.batch(0, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"validation": 5}, r"validation 5 is the end of all rows.*a source of its own"),
        ({"validation": 0.1}, r"validation 0\.1 is the end of all rows"),
        ({"packing": "stream"}, r"packing 'stream' fills rows.*allowed there: none, batch"),
        ({"train": {"streaming": False, "shuffle_buffer": 5}}, "shuffle_buffer 5 is of a stream"),
        ({"train": {"held_out": 5}}, r"train\.held_out 5 does not go with train\.streaming"),
        ({"train": {"limit": 5}}, r"train\.limit 5 does not go with"),
        (
            {"test": {"source": "hub", "path": "x", "streaming": True}},
            r"test\.streaming: only train is",
        ),
    ],
)
def test_what_does_not_go_with_streaming(change, message):
    """Catches: a setting that needs all rows and is silently without effect."""
    train = {"source": "hub", "path": "x", "streaming": True, **change.pop("train", {})}
    with pytest.raises(InputError, match=message):
        check_config({"train": train, **change}, DataConfig, "c.yaml")
