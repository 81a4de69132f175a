"""Files and hub folders as sources: splits, mapping, bad rows."""

from __future__ import annotations

import datasets
import pytest

from qdora.config import ColumnsConfig, DatasetConfig
from qdora.data.rows import Example, fingerprint
from qdora.errors import DataError, InputError
from qdora.tasks import TASKS, load_dataset, task_for
from qdora.tasks.base import Task, shuffled

INSTRUCTION = ColumnsConfig(question="instruction", completion="output", answer="answer")


def row(i: int) -> dict[str, str]:
    return {"question": f"Question {i}?", "answer": f"Steps, so the answer is {i}."}


@pytest.mark.parametrize("count", [1, 7, 1000])
def test_shuffle_is_that_of_datasets(count):
    """Catches: a shuffle of our own, with which the published Orca-Math split is another one."""
    table = datasets.Dataset.from_dict({"i": list(range(count))}).shuffle(seed=42)
    assert list(shuffled(count, 42)) == list(table["i"])


def test_every_source_has_a_loader():
    """Catches: a source that the configuration allows and nothing implements."""
    assert {"synthetic", "orca_math", "commonsense", "gsm8k", "file", "hub"} <= set(TASKS)
    assert all(task.rows is not Task.rows or task.load is not Task.load for task in map(type, TASKS.values()))


class TestFile:
    def test_splits_divide_the_rows(self, write_jsonl):
        """Catches: a held-out row that is trained on, or one that is in neither split."""
        path = str(write_jsonl([row(i) for i in range(20)]))

        def load(split):
            config = DatasetConfig(source="file", path=path, split=split, held_out=6, seed=3)
            return load_dataset(config, "stop")

        train, test = load("train").examples, load("test").examples
        order = shuffled(20, 3)
        assert [e.answer for e in train + test] == [str(i) for i in order]
        assert len(test) == 6

    def test_bad_row_moves_no_other_row(self, write_jsonl):
        """Catches: a skipped row that shifts the shuffle, so that test rows become training rows."""
        good = [row(i) for i in range(20)]
        config = {"source": "file", "split": "test", "held_out": 6}
        clean = load_dataset(DatasetConfig(path=str(write_jsonl(good, "a.jsonl")), **config), "skip")
        bad = shuffled(20, 42)[-2]
        dirty = write_jsonl([{} if i == bad else r for i, r in enumerate(good)], "b.jsonl")
        rest = load_dataset(DatasetConfig(path=str(dirty), **config), "skip")
        assert [e.answer for e in rest.examples] == [e.answer for e in clean.examples if e.answer != str(bad)]
        assert [s.origin for s in rest.skipped] == [f"{dirty}:{bad + 1}"]

    def test_without_held_out_split_is_a_label(self, write_jsonl):
        """Catches: a test file of its own that gives no rows, because nothing was held out of it."""
        path = str(write_jsonl([row(i) for i in range(5)]))
        config = DatasetConfig(source="file", path=path, split="test")
        assert len(load_dataset(config, "stop").examples) == 5

    @pytest.mark.parametrize("held_out", [5, 6])
    def test_held_out_too_large(self, write_jsonl, held_out):
        """Catches: an empty training set, or a negative slice that gives the wrong one."""
        path = str(write_jsonl([row(i) for i in range(5)]))
        with pytest.raises(InputError, match=f"held_out {held_out} leaves nothing.*5 rows"):
            load_dataset(DatasetConfig(source="file", path=path, held_out=held_out), "stop")

    def test_limit_takes_the_first_after_shuffling(self, write_jsonl):
        """Catches: a limit applied before the shuffle, or counting skipped rows."""
        path = str(write_jsonl([row(i) if i % 3 else {} for i in range(20)]))
        config = DatasetConfig(source="file", path=path, limit=4)
        expected = [str(i) for i in shuffled(20, 42) if i % 3][:4]
        assert [e.answer for e in load_dataset(config, "skip").examples] == expected

    def test_mapping_input_and_whitespace(self, write_json):
        """Catches: an instruction's input lost, the published outer whitespace kept in the completion."""
        rows = [
            {
                "instruction": " Translate. ",
                "input": "Hallo",
                "output": "\nA: The answer is 4.",
                "answer": 4.0,
            },
            {"instruction": "Count.", "input": "", "output": "\nA: Four.", "answer": "4"},
            {"instruction": "Add.", "output": "\nA: Four.", "answer": True},
        ]
        path = str(write_json(rows, "math.json"))
        data = load_dataset(DatasetConfig(source="file", path=path, columns=INSTRUCTION), "stop")
        found = {(e.question, e.completion, e.answer, e.task) for e in data.examples}
        assert found == {
            ("Translate.\nHallo", "A: The answer is 4.", "4.0", "math"),
            ("Count.", "A: Four.", "4", "math"),
            ("Add.", "A: Four.", "true", "math"),
        }

    def test_name_is_the_task(self, write_jsonl):
        """Catches: every test.json reported under the same name."""
        path = str(write_jsonl([row(1)]))
        config = DatasetConfig(source="file", path=path, name="AddSub")
        assert load_dataset(config, "stop").examples[0].task == "AddSub"

    @pytest.mark.parametrize(
        ("kind", "completion", "answer"),
        [
            ("numeric", "16 - 12 = 4 kids", "4"),
            ("numeric", "It is 1,234.5 dollars.", "1234.5"),
            ("numeric", "so 7-12 = -5.", "-5"),
            ("numeric", "16-12", "12"),
            ("numeric", "The answer is 3/4", "3/4"),
            ("numeric", "The answer is \u22123.", "-3"),
            ("numeric", r"The answer is $-\frac{1}{2}$.", "-1/2"),
            ("numeric", "The answer is 20-5=15.", "15"),
            ("numeric", r"It is \sqrt{2}", r"\sqrt{2}"),
            ("numeric", "It is 1e3", "1e3"),
            ("numeric", "5 > 3, so the correct option is B.", "B"),
            ("numeric", "It takes 7 1/2 hours.", "7 1/2"),
            ("numeric", "The ratio is 3:2.", "3:2"),
            ("numeric", "The answer is $5 for 2.", "5"),
            ("numeric", "\\boxed{\\frac{1}{2}} of 8", "1/2"),
            ("choice", "the correct answer is answer3", "answer3"),
            ("choice", "True, because it is false that not", "true"),
            ("text", "Paris", "Paris"),
        ],
    )
    def test_gold_answer_from_the_completion(self, write_jsonl, kind, completion, answer):
        """Catches: a minus read as a sign, a thousands separator or a full stop read as part of a number; a
        gold answer of 4 for 3/4, because outputs are read by another grammar."""
        path = str(write_jsonl([{"question": "q", "answer": completion}]))
        config = DatasetConfig(source="file", path=path, answer_kind=kind)
        (example,) = load_dataset(config, "stop").examples
        assert example.answer == answer
        if kind == "numeric":
            assert task_for("data").score(completion, example)["normalized"].correct

    @pytest.mark.parametrize(
        ("bad", "reason"),
        [
            ({"answer": "1"}, "column 'question' is missing; allowed: answer"),
            ({"qestion": "q", "answer": "1"}, "did you mean 'qestion'"),
            ({"question": "q"}, "column 'answer' is missing"),
            ({"question": " \n", "answer": "1"}, "column 'question' is empty"),
            ({"question": "q", "answer": ""}, "column 'answer' is empty"),
            ({"question": "q", "answer": None}, "column 'answer' is empty"),
            ({"question": ["q"], "answer": "1"}, "column 'question' holds a list, expected text"),
            ({"question": "\ud800", "answer": "1"}, "not valid Unicode"),
            ({"question": "q", "answer": "none"}, "no number in column 'answer'"),
            ('{"question": "q", ', "not valid JSON"),
            ("[1]", "expected a JSON object, got list"),
        ],
    )
    def test_bad_row_stops_or_is_skipped(self, write_jsonl, bad, reason):
        """Catches: a bad row trained on, dropped silently, or reported without file, line and reason."""
        path = write_jsonl([row(1), row(2), bad, row(4)])
        config = DatasetConfig(source="file", path=str(path))
        with pytest.raises(DataError) as caught:
            load_dataset(config, "stop")
        assert str(caught.value).startswith(f"{path}:3: ")
        assert reason in str(caught.value)
        data = load_dataset(config, "skip")
        assert len(data.examples) == 3
        assert [s.origin for s in data.skipped] == [f"{path}:3"]
        assert reason in data.skipped[0].reason

    @pytest.mark.parametrize("answer", ["nan", "NaN", "-inf", "None", "N/A"])
    def test_missing_number_as_text_is_a_bad_row(self, write_jsonl, answer):
        """Catches: a table's mark for a missing number taken as a gold answer that no output can meet."""
        path = write_jsonl([{**row(1), "label": "1"}, {**row(2), "label": answer}])
        columns = ColumnsConfig(answer="label")
        config = DatasetConfig(source="file", path=str(path), columns=columns)
        with pytest.raises(DataError, match=f":2: column 'label' holds '{answer}', which is no number"):
            load_dataset(config, "stop")
        text = config.model_copy(update={"answer_kind": "text"})
        assert len(load_dataset(text, "stop").examples) == 2

    def test_first_bad_row_of_the_file_is_named(self, write_jsonl):
        """Catches: the first bad row in shuffled order named, a rerun for every further one."""
        path = write_jsonl([row(i) if i % 4 else {} for i in range(1, 20)])
        with pytest.raises(DataError, match=r"data\.jsonl:4: .*; 3 more bad rows after it"):
            load_dataset(DatasetConfig(source="file", path=str(path), limit=1), "stop")

    @pytest.mark.parametrize("lines", [[], [{}, {}]])
    def test_no_usable_row(self, write_jsonl, lines):
        """Catches: an empty set that fails much later, in training or in a division by zero."""
        path = str(write_jsonl(lines))
        with pytest.raises(InputError, match="no usable row"):
            load_dataset(DatasetConfig(source="file", path=path), "skip")

    def test_unknown_choice_and_csv(self, tmp_path):
        """Catches: CSV columns that do not reach the mapping."""
        path = tmp_path / "a.csv"
        path.write_text("prompt,reply\nq,none of them\n")
        columns = ColumnsConfig(question="prompt", completion="reply")
        config = DatasetConfig(source="file", path=str(path), columns=columns, answer_kind="choice")
        with pytest.raises(DataError, match=r"a\.csv:2: no choice such as"):
            load_dataset(config, "stop")


class TestHub:
    CONFIG = DatasetConfig(source="hub", path="someone/things", name="easy", split="validation")

    def test_rows(self, monkeypatch):
        """Catches: name or split not passed on, the shuffle missing, rows without index."""

        def fake(dataset_id, name, split):
            assert (dataset_id, name, split) == ("someone/things", "easy", "validation")
            return datasets.Dataset.from_list([row(i) for i in range(9)])

        monkeypatch.setattr(datasets, "load_dataset", fake)
        examples = load_dataset(self.CONFIG, "stop").examples
        assert [e.answer for e in examples] == [str(i) for i in shuffled(9, 42)]
        assert examples[0].task == "things"
        assert examples[0].origin == f"someone/things[{examples[0].answer}]"

    def test_held_out(self, monkeypatch):
        """Catches: the split `test` looked up on the hub, although it is held out of `train`."""

        def fake(dataset_id, name, split):
            assert split == "train"
            return datasets.Dataset.from_list([row(i) for i in range(9)])

        monkeypatch.setattr(datasets, "load_dataset", fake)
        config = self.CONFIG.model_copy(update={"held_out": 2, "split": "test"})
        assert [e.answer for e in load_dataset(config, "stop").examples] == [
            str(i) for i in shuffled(9, 42)[-2:]
        ]
        with pytest.raises(InputError, match="split 'validation' with held_out 2"):
            load_dataset(self.CONFIG.model_copy(update={"held_out": 2}), "stop")

    @pytest.mark.parametrize(
        "error", [ConnectionError("offline"), ValueError("Unknown split"), RuntimeError("scripts"), OSError()]
    )
    def test_failures_are_input_errors(self, monkeypatch, error):
        """Catches: a hub failure that ends in a traceback."""

        def fake(*args, **kwargs):
            raise error

        monkeypatch.setattr(datasets, "load_dataset", fake)
        with pytest.raises(
            InputError, match=r"someone/things \(easy\), split 'validation': cannot be loaded"
        ):
            load_dataset(self.CONFIG, "stop")

    def test_column_missing(self, monkeypatch):
        """Catches: a wrong mapping reported once for each row."""
        table = datasets.Dataset.from_list([{"question": "q", "anwser": "1"}])
        monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: table)
        with pytest.raises(InputError, match="no column 'answer'; did you mean 'anwser'"):
            load_dataset(self.CONFIG, "stop")


def test_fingerprint():
    """Catches: a fingerprint that depends on where a file lies, or misses text moved between fields."""
    one = Example("ab", "c", "1", "t", "x:1")
    moved = Example("a", "bc", "1", "t", "x:1")
    elsewhere = Example("ab", "c", "1", "t", "y:7")
    assert fingerprint([one]) == fingerprint([elsewhere])
    assert len({fingerprint(e) for e in ([one], [moved], [one, moved], [moved, one], [])}) == 5
