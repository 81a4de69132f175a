"""Published sets: their layout, splits, prompts and gold answers."""

from __future__ import annotations

import datasets
import pytest

from qdora.config import DatasetConfig
from qdora.errors import DataError, InputError
from qdora.tasks import TASKS, load_dataset, task_for
from qdora.tasks.base import shuffled


def row(i: int) -> dict[str, str]:
    return {"question": f"Question {i}?", "answer": f"Steps, so the answer is {i}."}


def choice(i: int, task: str) -> dict[str, str]:
    return {
        "instruction": f"{task} {i}",
        "input": "",
        "output": "the correct answer is answer2",
        "answer": "answer2",
    }


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


class TestSynthetic:
    def test_count_and_limit(self):
        """Catches: count or limit ignored."""
        config = DatasetConfig(source="synthetic", count=12)
        assert len(load_dataset(config, "stop").examples) == 12
        limited = load_dataset(config.model_copy(update={"limit": 5}), "stop")
        assert limited.examples == load_dataset(config, "stop").examples[:5]
