"""Data of many rows: a table on the disk gives what objects in memory give."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from qdora.config import DataConfig, DatasetConfig
from qdora.data.batches import BatchPlan
from qdora.data.rows import fingerprint
from qdora.data.table import ExampleTable, write_once
from qdora.data.token_table import TokenTable, have_gaps, labels_of, lengths_of
from qdora.errors import DataError, InputError
from qdora.tasks import load_dataset
from qdora.tasks.prepare import prepare


@pytest.fixture
def on_disk(monkeypatch, tmp_path):
    """From the call on, a few rows are too many to be held."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def start():
        monkeypatch.setattr("qdora.tasks.base.IN_MEMORY", 5)
        monkeypatch.setattr("qdora.data.table.IN_MEMORY", 5)
        monkeypatch.setattr("qdora.data.table._CHUNK", 7)
        monkeypatch.setattr("qdora.data.table._MAPPED", 20)
        monkeypatch.setattr("qdora.data.token_table._OF_A_PROCESS", 10)

    return start


def rows(count):
    """Chats and questions, some bad, some long, some with the text of a special token."""
    for i in range(count):
        turns = [{"role": "user", "content": f"Is {i} large?"}, {"role": "assistant", "content": f"{i % 3}."}]
        if i % 4 == 1:
            turns += [{"role": "user", "content": f"And {i}?"}, {"role": "assistant", "content": "x" * i}]
        if i % 7 == 3:
            turns[0]["content"] += " </s>"
        yield {"messages": turns[:1] if i % 11 == 5 else turns}


def config(path, **settings):
    source = {"source": "file", "path": str(path), "held_out": 6}
    return DataConfig(
        train=DatasetConfig(**source, limit=settings.pop("limit", None)),
        test=DatasetConfig(**source, split="test"),
        **{"bad_rows": "skip", "max_length": 90, "prompt": "chat", **settings},
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"limit": 30, "validation": 0.2, "loss_on": "last"},
        {"validation": 7, "loss_on": "all", "parse_special_tokens": True},
    ],
)
def test_a_table_gives_what_objects_give(tokenizer, write_jsonl, on_disk, settings):
    """Catches: an example lost, exchanged or in another place; other tokens, gaps, labels, batches, counts of
    leaks or skipped rows; a second start that reads or tokenizes again; an environment that is exchanged."""
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}" + (
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    greeting = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hi."}]
    later = [{"messages": [*greeting, *row["messages"][:2]]} for row in rows(60)]
    data = [*rows(60), *list(rows(60))[::5], *later[::2]]
    path = write_jsonl(data)
    held = prepare(config(path, **settings), tokenizer, None)
    environment, names = os.environ, dict(os.environ)
    on_disk()
    mapped = prepare(config(path, **settings), tokenizer, None)
    assert os.environ is environment
    assert dict(os.environ) == names
    assert isinstance(mapped.train, TokenTable)
    assert list(mapped.train) == held.train
    assert [mapped.train[i] for i in (0, 3, -1)] == [held.train[i] for i in (0, 3, -1)]
    assert list(mapped.train[2:5]) == held.train[2:5]
    for measure in (lengths_of, labels_of, have_gaps):
        assert measure(mapped.train) == measure(held.train)
    for part in ("test", "validation", "leaked", "leaked_validation", "skipped", "keeps_template", "prompt"):
        assert getattr(mapped, part) == getattr(held, part), part
    assert sorted(mapped.special_text) == sorted(held.special_text)
    assert held.leaked + held.leaked_validation > 0
    assert held.skipped
    plans = [BatchPlan(lengths_of(d.train), 4, 0) for d in (held, mapped)]
    assert plans[0].batch(3) == plans[1].batch(3)

    cache = {file: file.stat().st_mtime_ns for file in (path.parent / "cache").rglob("*.arrow")}
    again = prepare(config(path, **settings), tokenizer, None)
    assert list(again.train) == held.train
    assert again.fingerprints == mapped.fingerprints
    assert {file: file.stat().st_mtime_ns for file in (path.parent / "cache").rglob("*.arrow")} == cache
    path.write_text(path.read_text().replace("large", "small"))
    other = prepare(config(path, **settings), tokenizer, None)
    assert "small" in tokenizer.decode(other.train[0].input_ids)
    assert other.fingerprints["train"] != mapped.fingerprints["train"]


def test_tokens_in_the_cache_are_those_of_the_same_input(tokenizer, write_jsonl, on_disk):
    """Catches: a second run with the tokens of another length, template or choice of rows; one that ends
    because somebody has cleared the cache."""
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}" + (
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    path = write_jsonl(list(rows(40)))

    def train(template=template, **settings):
        tokenizer.chat_template = template
        return prepare(config(path, **settings), tokenizer, None).train

    few = train(limit=20)
    on_disk()
    first = list(train())
    assert max(lengths_of(train(max_length=40))) <= 40 < max(lengths_of(first))
    other = train(template.replace("[{{ m.role }}]", "({{ m.role }})").replace("[assistant]", "(assistant)"))
    assert "(user)" in tokenizer.decode(other[0].input_ids)
    assert list(train(limit=20)) == few
    for file in (path.parent / "cache").rglob("*.arrow"):
        file.unlink()
    assert list(train()) == first


def test_every_field_of_an_example_returns(write_jsonl, write_json, on_disk):
    """Catches: options, turns or their weights lost on the disk; another order of a mixture's test set."""
    ask = "Please answer the following question with true or false, question: is {} odd?\n\nAnswer format: "
    root = None
    for task, words in (("boolq", ("true", "false")), ("piqa", ("solution1", "solution2"))):
        made = [
            {
                "instruction": ask.format(i) + "/".join(words),
                "input": "",
                "output": "x",
                "answer": words[i % 2],
            }
            for i in range(9)
        ]
        root = write_json(made, f"c/{task}/test.json").parents[1]
    sources = [
        DatasetConfig(source="commonsense", path=str(root), tasks=("boolq",), split="test", answers="text"),
        DatasetConfig(source="commonsense", path=str(root), tasks=("boolq", "piqa"), split="test"),
        DatasetConfig(source="file", path=str(write_jsonl(list(rows(12)))), seed=3, limit=9),
    ]
    held = [load_dataset(source, "skip") for source in sources]
    on_disk()
    for source, expected in zip(sources, held, strict=True):
        found = load_dataset(source, "skip")
        assert isinstance(found.examples, ExampleTable)
        assert list(found.examples) == expected.examples
        assert found.skipped == expected.skipped
        assert found.examples.fingerprint() != fingerprint(expected.examples[::-1])


def test_a_bad_row_far_behind_stops(tokenizer, write_jsonl, on_disk):
    """Catches: a bad row that is found in the table and passed over; a table that is left half-written."""
    lines = [json.dumps(row) for row in rows(5)] * 4
    path = write_jsonl([*lines, "{"])
    on_disk()
    for _ in range(2):
        with pytest.raises(DataError, match=r"data\.jsonl:21: not valid JSON"):
            load_dataset(DatasetConfig(source="file", path=str(path)), "stop")
    held = DatasetConfig(source="file", path=str(write_jsonl(lines)))
    with pytest.raises(DataError, match=r"tokens, longer than data\.max_length 12.*more bad rows"):
        prepare(DataConfig(train=held, max_length=12, loss_on="all"), tokenizer, None)


def test_one_of_several_processes_makes_a_table(tmp_path):
    """Catches: two ranks of a machine that make the same table, or one that reads it half-written."""
    written, path = [], tmp_path / "cache" / "a.arrow"

    def write(temporary):
        written.append(temporary)
        time.sleep(0.2)
        temporary.write_text("all of it")

    def start():
        write_once(path, write)
        return path.read_text()

    with ThreadPoolExecutor(4) as pool:
        assert [f.result() for f in [pool.submit(start) for _ in range(4)]] == ["all of it"] * 4
    assert len(written) == 1


def test_a_local_copy_of_a_hub_dataset(write_jsonl, tmp_path):
    """Catches: a split that a folder does not have answered with all of its rows; a folder without splits
    that `source: hub` no longer takes."""
    rows = [{"question": f"What is {i}?", "answer": str(i)} for i in range(3)]
    write_jsonl(rows, "one/a.jsonl")
    for split, own in (("train", rows[:2]), ("test", rows[2:])):
        write_jsonl(own, f"two/data/{split}-00000-of-00001.jsonl")

    def answers(folder, **keys):
        config = DatasetConfig(source=keys.pop("source", "hub"), path=str(tmp_path / folder), **keys)
        return sorted(example.answer for example in load_dataset(config, "stop").examples)

    assert answers("one") == ["0", "1", "2"]
    with pytest.raises(InputError, match="test"):
        answers("one", split="test")
    for source in ("hub", "file"):
        assert (answers("two", source=source), answers("two", source=source, split="test")) == (
            ["0", "1"],
            ["2"],
        )
    assert answers("two", source="file", held_out=1, split="test") != ["2"]
    with pytest.raises(InputError, match=r"two: split 'validation'"):
        answers("two", split="validation")


@pytest.mark.parametrize("given", [{}, {"HF_HOME": "/a/home"}, {"HF_DATASETS_CACHE": "/a/cache"}])
def test_tables_lie_in_the_cache_of_datasets(given):
    """Catches: a rule of `datasets` that has changed; a folder that its variables do not move."""
    ask = "import datasets; from qdora.data.table import cache_folder; "
    ask += "assert cache_folder() == __import__('pathlib').Path(datasets.config.HF_DATASETS_CACHE, 'qdora')"
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_HOME", "HF_DATASETS_CACHE")}
    subprocess.run([sys.executable, "-c", ask], env=environment | given, check=True)
