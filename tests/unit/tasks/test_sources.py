"""Sources: splits, mapping, gold answers, bad rows."""

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


def choice(i: int, task: str) -> dict[str, str]:
    return {
        "instruction": f"{task} {i}",
        "input": "",
        "output": "the correct answer is answer2",
        "answer": "answer2",
    }


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


class TestOrcaMath:
    def test_published_split(self, write_jsonl):
        """Catches: a held-out part other than the last rows of the shuffled set."""
        path = str(write_jsonl([row(i) for i in range(5_020)]))
        test = load_dataset(DatasetConfig(source="orca_math", path=path, split="test", limit=500), "stop")
        train = load_dataset(DatasetConfig(source="orca_math", path=path), "stop")
        table = datasets.Dataset.from_dict({"i": list(range(5_020))}).shuffle(seed=42)
        published = table.select(range(len(table) - 5_000, len(table))).select(range(500))
        assert [e.answer for e in test.examples] == [str(i) for i in published["i"]]
        assert len(train.examples) == 20
        assert test.examples[0].task == "orca_math"

    def test_small_copy(self, write_jsonl):
        """Catches: a copy too small for the published split that silently gives another one."""
        path = str(write_jsonl([row(i) for i in range(10)]))
        with pytest.raises(InputError, match=r"held_out 5000 leaves nothing.*10 rows"):
            load_dataset(DatasetConfig(source="orca_math", path=path), "stop")
        config = DatasetConfig(source="orca_math", path=path, held_out=3, split="test")
        assert len(load_dataset(config, "stop").examples) == 3

    @pytest.mark.parametrize(
        ("solution", "published", "answer"),
        [
            ("It costs $1,200.", "200", "1200"),
            ("In all $5.50.", "$5.50", "$5.50"),
            ("ratio 3:2 holds", "3:2", "3:2"),
            ("Bill", "", ""),
            ("The answer is 3/4.", "4", "3/4"),
            ("The answer is 7 apples, 2 for each.", "2", "7"),
        ],
    )
    def test_published_rule(self, write_jsonl, solution, published, answer):
        """Catches: a gold answer other than that of the published scores; one that `normalized` reads by
        another grammar than outputs."""
        path = str(write_jsonl([{"question": f"q{i}", "answer": solution} for i in range(2)]))
        config = DatasetConfig(source="orca_math", path=path, held_out=1, split="test")
        example = load_dataset(config, "stop").examples[0]
        verdicts = TASKS["orca_math"].score(solution, example)
        assert (verdicts["published"].gold or "") == published
        assert example.answer == answer
        assert all(verdict.correct for verdict in verdicts.values()) is (answer != "")

    def test_hub(self, monkeypatch):
        """Catches: the hub's rows taken another way than those of a local copy; remote code trusted."""
        calls = []

        def fake(*args, **kwargs):
            calls.append((args, kwargs))
            return datasets.Dataset.from_list([row(i) for i in range(5_010)])

        monkeypatch.setattr(datasets, "load_dataset", fake)
        data = load_dataset(DatasetConfig(source="orca_math"), "stop")
        assert calls == [(("microsoft/orca-math-word-problems-200k", None), {"split": "train"})]
        assert [e.answer for e in data.examples] == [str(i) for i in shuffled(5_010, 42)[:10]]
        first = shuffled(5_010, 42)[0]
        assert data.examples[0].origin == f"microsoft/orca-math-word-problems-200k[{first}]"


class TestCommonsense:
    @pytest.fixture
    def root(self, tmp_path, write_json):
        for task, count in (("boolq", 4), ("ARC-Easy", 2)):
            for split in ("train", "test"):
                write_json([choice(i, task) for i in range(count)], f"{task}/{split}.json")
        return tmp_path

    def load(self, root, **rest):
        return load_dataset(DatasetConfig(source="commonsense", path=str(root), **rest), "stop").examples

    def test_one_task(self, root):
        """Catches: a test set that is shuffled, so that a limit takes other questions each time."""
        examples = self.load(root, tasks=("boolq",), split="test")
        assert [e.question for e in examples] == [f"boolq {i}" for i in range(4)]
        assert {(e.task, e.answer, e.completion) for e in examples} == {
            ("boolq", "answer2", "the correct answer is answer2")
        }
        assert examples[1].origin == f"{root}/boolq/test.json:8"

    def test_mixed_training_is_shuffled_together(self, root):
        """Catches: tasks trained one after the other."""
        together = [f"boolq {i}" for i in range(4)] + [f"ARC-Easy {i}" for i in range(2)]
        examples = self.load(root, tasks=("boolq", "ARC-Easy"))
        assert [e.question for e in examples] == [together[i] for i in shuffled(6, 42)]

    def test_mixed_test_takes_turns(self, root):
        """Catches: a limited mixed test set that holds the first task alone."""
        examples = self.load(root, tasks=("boolq", "ARC-Easy"), split="test")
        assert [e.task for e in examples] == ["boolq", "ARC-Easy", "boolq", "ARC-Easy", "boolq", "boolq"]

    def test_missing_folders(self, root):
        """Catches: a missing task skipped silently, or reported without what is there."""
        with pytest.raises(InputError, match=r"piqa: no such .*task 'piqa'.*holds: ARC-Easy, boolq"):
            self.load(root)
        (root / "ARC-challenge").mkdir()
        with pytest.raises(InputError, match="did you mean 'ARC-challenge'"):
            self.load(root, tasks=("ARC-Challenge",))
        with pytest.raises(InputError, match="expected a folder with one folder for each task"):
            self.load(root / "nothing", tasks=("boolq",))
        (root / "boolq" / "test.json").unlink()
        with pytest.raises(InputError, match="the test set of task 'boolq'"):
            self.load(root, tasks=("boolq",), split="test")

    def test_row_without_answer(self, root, write_json):
        """Catches: a row without gold answer scored as wrong."""
        write_json([choice(0, "x"), {**choice(1, "x"), "answer": ""}], "boolq/test.json")
        with pytest.raises(DataError, match=r"boolq/test\.json:8: column 'answer' is empty"):
            self.load(root, tasks=("boolq",), split="test")


class TestGsm8k:
    SOLUTION = "48/2 = <<48/2=24>>24 clips.\n48+24 = $<<48+24=1072>>1,072.\n#### 1,072"

    def test_solution(self, write_jsonl):
        """Catches: calculator annotations trained on, a separator in the gold answer, the end line lost."""
        path = str(write_jsonl([{"question": "How many?", "answer": self.SOLUTION}]))
        (found,) = load_dataset(DatasetConfig(source="gsm8k", path=path), "stop").examples
        assert found.completion == "48/2 = 24 clips.\n48+24 = $1,072.\n#### 1,072"
        assert (found.answer, found.task, found.origin) == ("1072", "gsm8k", f"{path}:1")

    def test_split_file_and_order(self, tmp_path, write_jsonl):
        """Catches: the training file evaluated on; a test set in another order than published."""
        rows = [{"question": f"q{i}", "answer": f"#### {i}"} for i in range(6)]
        write_jsonl(rows[:4], "train.jsonl")
        path = write_jsonl(rows, "test.jsonl")

        def load(split):
            config = DatasetConfig(source="gsm8k", path=str(tmp_path), split=split)
            return load_dataset(config, "stop")

        assert [e.answer for e in load("test").examples] == list("012345")
        assert [e.answer for e in load("train").examples] == [str(i) for i in shuffled(4, 42)]
        path.unlink()
        with pytest.raises(InputError, match=r"test\.jsonl: no such file.*GSM8K test set"):
            load("test")

    @pytest.mark.parametrize("solution", ["72", "72\n####  ", "72\n#### none"])
    def test_no_gold_answer(self, write_jsonl, solution):
        """Catches: a solution without `#### N` given an empty gold answer."""
        path = str(write_jsonl([{"question": "q", "answer": solution}]))
        with pytest.raises(DataError, match=r"data\.jsonl:1: .*no '#### N'"):
            load_dataset(DatasetConfig(source="gsm8k", path=path), "stop")

    def test_hub(self, monkeypatch):
        """Catches: another configuration or split of the hub's GSM8K."""
        calls = []

        def fake(*args, **kwargs):
            calls.append((args, kwargs))
            return datasets.Dataset.from_list([{"question": "q", "answer": "#### 1"}])

        monkeypatch.setattr(datasets, "load_dataset", fake)
        load_dataset(DatasetConfig(source="gsm8k", split="test"), "stop")
        assert calls == [(("openai/gsm8k", "main"), {"split": "test"})]


class TestAlpaca:
    @staticmethod
    def rows(count):
        return [
            {"instruction": f"Do {i}.", "input": "", "output": f"Done {i}.\nAt once."} for i in range(count)
        ]

    def test_input_and_answer(self, write_json):
        """Catches: an input that is lost or runs into the instruction; a blank one with a heading; an answer
        that is not the output."""
        rows = self.rows(3)
        rows[1] |= {"input": " 1, 2, 3 "}
        rows[2] |= {"input": "\n"}
        config = DatasetConfig(source="alpaca", path=str(write_json(rows, "a.json")), held_out=1)
        found = [*load_dataset(config, "stop").examples]
        found += load_dataset(config.model_copy(update={"split": "test"}), "stop").examples
        questions = {example.question: example for example in found}
        assert questions.keys() == {"Do 0.", "Do 1.\n\n### Input:\n1, 2, 3", "Do 2."}
        example = questions["Do 2."]
        assert (example.completion, example.answer, example.task) == (*["Done 2.\nAt once."] * 2, "alpaca")
        assert task_for("alpaca").score("done 2.\nLater.", example)["first_line"].correct
        assert not task_for("alpaca").score("Done 1.", example)["first_line"].correct

    def test_held_out_part(self, write_json):
        """Catches: test rows that are trained on; another number than 1,000 where none is given."""
        path = str(write_json(self.rows(1010), "a.json"))

        def load(split, **keys):
            config = DatasetConfig(source="alpaca", path=path, split=split, **keys)
            return [example.question for example in load_dataset(config, "stop").examples]

        order = [f"Do {i}." for i in shuffled(1010, 42)]
        assert load("train") == order[:10]
        assert load("test") == order[10:]
        assert load("train", held_out=10, limit=4) == order[:4]
        assert load("test", held_out=10) == order[-10:]

    def test_hub(self, monkeypatch):
        """Catches: another data set of the hub, or a column without which a row cannot be used."""
        calls = []

        def fake(*args, **kwargs):
            calls.append((args, kwargs))
            return datasets.Dataset.from_list(self.rows(1003))

        monkeypatch.setattr(datasets, "load_dataset", fake)
        assert len(load_dataset(DatasetConfig(source="alpaca"), "stop").examples) == 3
        assert calls == [(("yahma/alpaca-cleaned", None), {"split": "train"})]


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


class TestSynthetic:
    def test_count_and_limit(self):
        """Catches: count or limit ignored."""
        config = DatasetConfig(source="synthetic", count=12)
        assert len(load_dataset(config, "stop").examples) == 12
        limited = load_dataset(config.model_copy(update={"limit": 5}), "stop")
        assert limited.examples == load_dataset(config, "stop").examples[:5]


def test_fingerprint():
    """Catches: a fingerprint that depends on where a file lies, or misses text moved between fields."""
    one = Example("ab", "c", "1", "t", "x:1")
    moved = Example("a", "bc", "1", "t", "x:1")
    elsewhere = Example("ab", "c", "1", "t", "y:7")
    assert fingerprint([one]) == fingerprint([elsewhere])
    assert len({fingerprint(e) for e in ([one], [moved], [one, moved], [moved, one], [])}) == 5
