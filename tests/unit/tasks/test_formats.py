"""Chats and questions in the forms that people bring: recognized, named, refused by row."""

from __future__ import annotations

from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qdora.config import DataConfig, DatasetConfig
from qdora.data.rows import Turn, fingerprint
from qdora.errors import DataError, InputError
from qdora.tasks import find_task, load_dataset
from qdora.tasks.prepare import load_split, load_test, load_training, prepare

USER, ASSISTANT, SYSTEM = Turn("user", "Who?"), Turn("assistant", "Ben has 7."), Turn("system", "Be brief.")


def openai(*turns: tuple[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns], **more}


def sharegpt(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"id": "a1", "conversations": [{"from": role, "value": content} for role, content in turns]}


CHATS = {
    "messages": openai(("system", "Be brief."), ("user", " Who?\n"), ("assistant", "Ben has 7.")),
    "developer": openai(("developer", "Be brief."), ("user", "Who?"), ("assistant", "Ben has 7.")),
    "conversations": sharegpt(("system", "Be brief."), ("human", "Who?"), ("gpt", "Ben has 7.")),
    "system column": sharegpt(("human", "Who?"), ("gpt", "Ben has 7.")) | {"system": "Be brief."},
    "prompt of turns": {
        "prompt": openai(("system", "Be brief."), ("user", "Who?"))["messages"],
        "completion": openai(("assistant", "Ben has 7."))["messages"],
    },
}


@pytest.fixture
def load(write_jsonl):
    """The examples of rows in a file, by a configuration's keys."""

    def load(rows: list[Any], bad_rows: str = "stop", **keys: Any):
        path = str(write_jsonl(rows))
        return load_dataset(DatasetConfig.model_validate({"source": "file", "path": path, **keys}), bad_rows)

    return load


@pytest.mark.parametrize("name", CHATS)
def test_chats_are_recognized(load, name):
    """Catches: a form of chats that is not known by its columns, another role, a system turn lost."""
    (example,) = load([CHATS[name]]).examples
    said = tuple(turn._replace(trained=True) for turn in example.turns)
    assert said == (SYSTEM, USER, ASSISTANT)
    assert (example.question, example.completion, example.answer) == ("Who?", "Ben has 7.", "7")
    assert example.asked == example.turns[:2]
    assert example.origin.endswith("data.jsonl:1")


@pytest.mark.parametrize(
    ("row", "question"),
    [
        ({"instruction": "Sort.", "input": "b, a", "output": "a, b"}, "Sort.\n\n### Input:\nb, a"),
        ({"instruction": "Sort b, a.", "input": "", "output": "a, b"}, "Sort b, a."),
        ({"instruction": "Sort b, a.", "output": "a, b", "text": "..."}, "Sort b, a."),
        ({"prompt": "Sort b, a.", "completion": "a, b"}, "Sort b, a."),
    ],
)
def test_texts_are_recognized(load, row, question):
    """Catches: an instruction without its input; free answers refused for want of a number."""
    (example,) = load([row]).examples
    assert (example.question, example.completion, example.answer) == (question, "a, b", "")
    assert example.turns == ()
    (text,) = load([row], answer_kind="text").examples
    assert text.answer == "a, b"


def test_the_alpaca_task_and_the_format_agree(load, write_jsonl):
    """Catches: two wordings of the same rows."""
    rows = [{"instruction": f"Say {i}.", "input": "twice" * (i % 2), "output": f"{i}"} for i in range(4)]
    by_format = load(rows).examples
    config = DatasetConfig(source="alpaca", path=str(write_jsonl(rows)), held_out=1)
    by_task = load_dataset(config, "stop").examples
    assert {e.question for e in by_task} < {e.question for e in by_format}


def test_questions_and_answers_go_first(load):
    """Catches: a data set of questions and answers that turns into chats for a further column."""
    row = {"question": "Who?", "answer": "Ben has 7.", **openai(("user", "x"), ("assistant", "y"))}
    (example,) = load([row]).examples
    assert (example.question, example.turns) == ("Who?", ())
    assert load([row], format="messages").examples[0].turns == (Turn("user", "x"), Turn("assistant", "y"))
    columns = {"turns": "messages"}
    assert load([row], columns=columns).examples[0].turns[0].content == "x"


def test_the_last_assistant_turn_is_the_completion(load):
    """Catches: a question without the turns before it, or the first answer taken for the last."""
    rows = [
        openai(
            ("user", "Hi"), ("assistant", "Hello"), ("user", "Who?"), ("assistant", "Ben"), ("user", "Thanks")
        )
    ]
    (example,) = load(rows).examples
    assert (example.question, example.completion) == ("Hi\n\nHello\n\nWho?", "Ben")
    assert example.questions == [example.question, "Hi", "Who?", "Thanks"]
    assert [turn.content for turn in example.asked] == ["Hi", "Hello", "Who?"]


def test_untrained_turns(load):
    """Catches: OpenAI's weight 0 passed over; the turns of a prompt trained, a number read as false."""
    rows = [
        openai(("user", "Hi"), ("assistant", "Hello"), ("user", "Who?"), ("assistant", "Ben")),
        CHATS["messages"],
    ]
    rows[0]["messages"][1]["weight"] = 0
    rows[1] = {**rows[1], "messages": [turn | {"weight": 1} for turn in rows[1]["messages"]]}
    first, second = sorted(load(rows).examples, key=lambda e: e.origin)
    assert [turn.trained for turn in first.turns] == [True, False, True, True]
    assert all(turn.trained for turn in second.turns)
    (of_prompt,) = load([CHATS["prompt of turns"]]).examples
    assert [turn.trained for turn in of_prompt.turns] == [False, False, True]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"messages": []}, "column 'messages' is empty"),
        ({"messages": "[]"}, "column 'messages' holds a str, expected a list of turns"),
        ({"messages": ["hi"]}, "turn 1 is a str, expected an object with role and content"),
        (
            {"messages": [{"role": "user", "text": "hi"}]},
            "turn 1 has 'role', 'text', expected role and content",
        ),
        (openai(("user", "Hi"), ("asistant", "Ho")), "turn 2: role 'asistant'; did you mean 'assistant'?"),
        (openai(("user", "Hi"), ("tool", "7")), "turn 2: role 'tool'"),
        (openai(("user", "Hi"), ("assistant", " ")), "turn 2 (assistant) is empty"),
        (openai(("user", "Hi"), ("assistant", None)), "turn 2 (assistant) is empty"),
        (
            openai(("user", [{"type": "text"}]), ("assistant", "x")),
            "turn 1 (user): key 'content' holds a list",
        ),
        (openai(("user", "Hi")), "no assistant turn among 1"),
        (openai(("system", "Hi"), ("assistant", "x")), "begins with an assistant turn"),
        (
            openai(("user", "Hi"), ("assistant", "x"), tools=[{"type": "function"}]),
            "column 'tools' would not",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "x"},
                    {"role": "assistant", "content": "x", "tool_calls": [1]},
                ]
            },
            "turn 2 (assistant) has 'tool_calls', which is not rendered",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "x"},
                    {"role": "assistant", "content": "x", "weight": 2},
                ]
            },
            "turn 2 (assistant): weight '2'; allowed: 0",
        ),
        ({**CHATS["messages"], "system": "Hi"}, "both a column 'system' and a system turn"),
        ({"question": "q", "answer": "1"}, "column 'messages' is missing"),
        ('{"messages": [', "not valid JSON"),
    ],
)
def test_bad_rows_are_named(load, bad, reason):
    """Catches: a bad chat trained on, dropped silently, or reported without file, line and reason."""
    rows = [CHATS["messages"], bad, CHATS["messages"]]
    with pytest.raises(DataError) as caught:
        load(rows)
    assert ":2: " in str(caught.value)
    assert reason in str(caught.value)
    data = load(rows, "skip")
    assert (len(data.examples), len(data.skipped)) == (2, 1)


def test_a_history_is_not_lost(load):
    """Catches: earlier rounds of an Alpaca row, or its system text, left out of what is trained."""
    row = {"instruction": "And?", "output": "x", "history": [["a", "b"]]}
    with pytest.raises(DataError, match="column 'history' would not be rendered"):
        load([row])
    assert load([{**row, "history": []}]).examples


def test_unknown_columns(load):
    """Catches: an error that names neither what came nor what is known."""
    with pytest.raises(InputError) as caught:
        load([{"query": "q", "response": "r"}])
    message = str(caught.value)
    assert "'query', 'response' are of no format" in message
    assert "messages: messages (a list of {role, content})" in message
    assert "alpaca: instruction, output" in message
    with pytest.raises(InputError, match=r"'dialog' holds turns: set columns: \{turns: dialog\}"):
        load([{"dialog": CHATS["messages"]["messages"]}])
    with pytest.raises(
        InputError, match="objects under 'data' have those of messages: expected an array of them"
    ):
        load([{"version": 1, "data": [CHATS["messages"]]}])
    assert load([{"dialog": CHATS["messages"]["messages"]}], columns={"turns": "dialog"}).examples


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        (
            {"format": "alpaca", "columns": {"question": "q"}},
            "columns.question belongs to format 'question_answer'",
        ),
        ({"format": "alpaca", "columns": {"turns": "q"}}, "columns.turns names a list of turns"),
        ({"columns": {"turns": "q", "question": "x"}}, "does not go with columns.question"),
        (
            {"source": "gsm8k", "format": "messages"},
            "format belongs to source 'file' or 'hub', not to 'gsm8k'",
        ),
    ],
)
def test_keys_that_do_not_go_together(keys, reason):
    """Catches: a key that is passed over."""
    with pytest.raises(InputError, match=reason):
        find_task(DatasetConfig.model_validate({"source": "file", "path": "x.jsonl", **keys}))


def test_parquet_and_the_hub(tmp_path, monkeypatch):
    """Catches: structs of a table read otherwise than objects of JSON; a hub data set that must have
    the columns of questions."""
    table = pa.Table.from_pylist([CHATS["messages"], openai(("user", "Who?"), ("assistant", "Ben has 7."))])
    pq.write_table(table, tmp_path / "chats.parquet")
    config = DatasetConfig(source="file", path=str(tmp_path / "chats.parquet"))
    turns = {example.turns for example in load_dataset(config, "stop").examples}
    assert turns == {(SYSTEM, USER, ASSISTANT), (USER, ASSISTANT)}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset(table))
    hub = DatasetConfig(source="hub", path="someone/chats", split="train_sft")
    assert {example.turns for example in load_dataset(hub, "stop").examples} == turns
    named = DatasetConfig(source="hub", path="someone/chats", format="conversations")
    with pytest.raises(InputError, match=r"no column 'conversations'; .*messages"):
        load_dataset(named, "stop")


def test_fingerprints(load):
    """Catches: two chats that only their roles tell apart counted as the same data; a changed fingerprint of
    questions and answers."""
    one = load([openai(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))]).examples
    other = load([openai(("user", "a\n\nb\n\nc"), ("assistant", "d"))]).examples
    assert one[0].question == other[0].question
    assert fingerprint(one) != fingerprint(other)
    questions = load([{"question": "a", "answer": "b 1"}], name="n").examples
    # sha256 of '["a", "b 1", "1", "n"]' and a line feed
    assert fingerprint(questions) == "cc1183edc20a0430b21d7c29e7823c308e9b06e5d463dc674621955038925426"


class TestWithoutATestSet:
    def config(self, path: Any, **keys: Any) -> DataConfig:
        train = {"source": "file", "path": str(path)}
        return DataConfig.model_validate({"train": train, "max_length": 256, **keys})

    def test_prepares(self, write_jsonl, tokenizer):
        """Catches: a run that cannot train for want of a test set; answers without a number refused there."""
        path = write_jsonl([{"question": f"Who is {i}?", "answer": "Ben"} for i in "abcdef"])
        data = prepare(self.config(path, validation=2), tokenizer, None)
        assert (len(data.train), len(data.validation), data.test) == (4, 2, [])
        assert set(data.fingerprints) == {"train", "validation"}
        assert (data.counts()["test"], data.prompt, data.keeps_template) == (0, "question_answer", False)

    def test_evaluation_says_what_to_set(self, write_jsonl, tokenizer):
        """Catches: a traceback, or answers scored against nothing."""
        path = write_jsonl([{"question": f"Who is {i}?", "answer": "Ben"} for i in "abcdef"])
        with pytest.raises(InputError, match=r"no test set: data\.test is not set"):
            load_test(self.config(path), tokenizer)
        with pytest.raises(InputError, match=r"validation set has no gold answer .* set answer_kind: text"):
            load_split(self.config(path, validation=2), tokenizer, "validation")
        config = self.config(path, validation=2)
        text = config.train.model_copy(update={"answer_kind": "text"})
        config = config.model_copy(update={"train": text})
        assert [e.answer for e in load_split(config, tokenizer, "validation").examples] == ["Ben", "Ben"]

    def test_answers_still_need_a_number_with_a_test_set(self, write_jsonl, tokenizer):
        """Catches: rows of questions that were bad trained on now, in a run whose answers are scored."""
        train = write_jsonl([{"question": "Who?", "answer": "Ben"}])
        test = write_jsonl([{"question": "How many?", "answer": "7"}], "test.jsonl")
        config = self.config(train, test={"source": "file", "path": str(test), "split": "test"})
        with pytest.raises(DataError, match="no number in column 'answer'"):
            prepare(config, tokenizer, None)


class TestChatsInARun:
    END = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )

    @pytest.fixture
    def tokenizer(self, tokenizer):
        tokenizer.chat_template = self.END
        return tokenizer

    def config(self, train: Any, test: Any = None, **keys: Any) -> DataConfig:
        sets: dict[str, Any] = {"train": {"source": "file", "path": str(train)}}
        if test is not None:
            sets["test"] = {"source": "file", "path": str(test), "split": "test"}
        return DataConfig.model_validate({**sets, "max_length": 256, **keys})

    def test_they_are_rendered_by_the_chat_template(self, write_jsonl, tokenizer):
        """Catches: chats under the default prompt, which holds one question; a prompt of the user's own
        passed over; a chat template for rows that none renders."""
        path = write_jsonl([CHATS["messages"], CHATS["developer"]])
        data = prepare(self.config(path), tokenizer, None)
        assert (data.prompt, data.keeps_template, len(data.train)) == ("chat", True, 2)
        with pytest.raises(InputError, match=r"'alpaca' has room for one question, .*:[12] is a chat"):
            prepare(self.config(path, prompt="alpaca"), tokenizer, None)
        plain = write_jsonl([{"question": "How many?", "answer": "7"}], "plain.jsonl")
        with pytest.raises(InputError, match=r"data\.chat_template renders chats"):
            prepare(self.config(plain, chat_template="plain"), tokenizer, None)

    def test_test_questions_are_removed(self, write_jsonl, tokenizer):
        """Catches: a test question left in a later turn of a training chat."""
        several = openai(("user", "Hi"), ("assistant", "Hello"), ("user", "how MANY?"), ("assistant", "7"))
        train = write_jsonl([several, openai(("user", "Why?"), ("assistant", "So."))])
        test = write_jsonl(
            [openai(("system", "Be brief."), ("user", "How many?"), ("assistant", "7"))], "test.jsonl"
        )
        config = self.config(train, test)
        data = prepare(config, tokenizer, None)
        assert (len(data.train), data.leaked, data.test[0].answer) == (1, 1, "7")
        assert load_training(config, data.test).leaked == 1

    def test_a_test_set_of_chats_needs_gold_answers(self, write_jsonl, tokenizer):
        """Catches: free answers scored against the empty text."""
        train = write_jsonl([CHATS["messages"]])
        test = write_jsonl([openai(("user", "How?"), ("assistant", "So."))], "test.jsonl")
        with pytest.raises(
            DataError, match=r"test\.jsonl:1: no number in the answer that is trained .*set answer_kind"
        ):
            prepare(self.config(train, test), tokenizer, None)

    def test_loss_on_reaches_the_tokens(self, write_jsonl, tokenizer):
        """Catches: a key that is read and not used."""
        several = openai(("user", "Hi"), ("assistant", "Hello"), ("user", "Who?"), ("assistant", "Ben"))
        path = write_jsonl([several])
        labels = [
            prepare(self.config(path, loss_on=loss_on), tokenizer, None).train[0].labels
            for loss_on in ("last", "assistant", "all")
        ]
        assert labels == sorted(set(labels))
