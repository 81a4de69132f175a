"""The whole way from a configuration to token ids."""

from __future__ import annotations

import json

import pytest

from qdora.config import DataConfig, DatasetConfig
from qdora.errors import DataError, InputError
from qdora.tasks.prepare import load_split, load_test, prepare


def row(i: int) -> dict[str, str]:
    return {"question": f"What is {i} + 1?", "answer": f"The answer is {i + 1}."}


def test_everything_together(tokenizer, write_jsonl):
    """Catches: a leak trained on, a bad row not counted, a fingerprint of unused examples."""
    train = write_jsonl([row(0), row(1), {}, row(2), {**row(3), "answer": "1 " * 200}], "train.jsonl")
    test = write_jsonl([row(1), row(9), {**row(8), "question": "x " * 200}], "test.jsonl")
    config = DataConfig(
        train=DatasetConfig(source="file", path=str(train)),
        test=DatasetConfig(source="file", path=str(test), split="test"),
        max_length=80,
        bad_rows="skip",
    )
    data = prepare(config, tokenizer, context_length=80)
    assert sorted(t.origin for t in data.train) == [f"{train}:1", f"{train}:4"]
    assert sorted(e.origin for e in data.test) == [f"{test}:1", f"{test}:2"]
    assert data.leaked == 1
    assert sorted(s.origin for s in data.skipped) == [f"{test}:3", f"{train}:3", f"{train}:5"]
    assert data.pad_id == tokenizer.pad_token_id
    assert load_test(config, tokenizer).examples == data.test

    write_jsonl([row(0), row(2)], "train.jsonl")
    again = prepare(config, tokenizer, context_length=None)
    assert set(again.fingerprints) == {"train", "test"}
    assert again.fingerprints["test"] == data.fingerprints["test"]
    with pytest.raises(DataError, match=r"test\.jsonl:3: the prompt alone has"):
        prepare(config.model_copy(update={"bad_rows": "stop"}), tokenizer, None)


@pytest.mark.parametrize("parse", [False, True])
def test_special_tokens_in_the_data(tokenizer, write_jsonl, parse):
    """Catches: the key read in one of both sets only; text of special tokens of which nobody hears."""
    rows = [row(0), {**row(1), "question": "a</s>b"}, {**row(2), "answer": "c <s> 2"}]
    train = write_jsonl(rows, "train.jsonl")
    test = write_jsonl([{**row(3), "answer": "<s> 2"}, {**row(4), "question": "</s> " * 12}], "test.jsonl")
    config = DataConfig(
        train=DatasetConfig(source="file", path=str(train)),
        test=DatasetConfig(source="file", path=str(test), split="test"),
        max_length=50 if parse else 200,
        parse_special_tokens=parse,
    )
    data = prepare(config, tokenizer, None)
    assert sorted(data.special_text) == [f"{test}:2 ('</s>')", f"{train}:2 ('</s>')", f"{train}:3 ('<s>')"]
    found = {t.origin: t.input_ids for t in data.train}
    assert found[f"{train}:2"].count(tokenizer.eos_token_id) == 1 + parse
    assert found[f"{train}:3"].count(tokenizer.bos_token_id) == 1 + parse
    if not parse:
        with pytest.raises(DataError, match=r"test\.jsonl:2: the prompt alone has"):
            prepare(config.model_copy(update={"max_length": 50}), tokenizer, None)


def test_rows_of_one_line(tokenizer, tmp_path, write_jsonl):
    """Catches: a fingerprint without the rows that share a line with one that is left out."""
    rows = [row(0), {**row(1), "answer": "1 " * 200}, row(2)]
    train = tmp_path / "train.json"
    train.write_text(json.dumps(rows))
    config = DataConfig(
        train=DatasetConfig(source="file", path=str(train)),
        test=DatasetConfig(source="file", path=str(write_jsonl([row(9)]))),
        max_length=80,
        bad_rows="skip",
    )
    data = prepare(config, tokenizer, None)
    assert [s.origin for s in data.skipped] == [f"{train}:1[1]"]
    lines = write_jsonl(rows, "train.jsonl")
    other = config.model_copy(update={"train": DatasetConfig(source="file", path=str(lines), name="train")})
    assert data.fingerprints == prepare(other, tokenizer, None).fingerprints


def test_fingerprint_is_of_the_used_examples(tokenizer, write_jsonl):
    """Catches: two runs on the same used examples told apart, or on different ones taken for the same."""

    def fingerprint(lines):
        train = write_jsonl(lines, "train.jsonl")
        config = DataConfig(
            train=DatasetConfig(source="gsm8k", path=str(train), split="test"),  # keeps the order
            test=DatasetConfig(source="file", path=str(write_jsonl([row(9)], "test.jsonl"))),
            max_length=80,
            bad_rows="skip",
        )
        return prepare(config, tokenizer, None).fingerprints["train"]

    one, two, long = ({"question": f"q {i}", "answer": f"{'1 ' * i * 50}#### {i}"} for i in (0, 1, 2))
    two = {"question": "q two", "answer": "#### 2"}
    assert fingerprint([one, two]) == fingerprint([one, long, two, {}])
    assert fingerprint([one, two]) != fingerprint([two, one])


def test_synthetic(tokenizer):
    """Catches: generated sets that share problems or do not fit the default configuration."""
    config = DataConfig(
        train=DatasetConfig(source="synthetic", count=300),
        test=DatasetConfig(source="synthetic", count=100, split="test", seed=7),
    )
    data = prepare(config, tokenizer, context_length=2048)
    assert (len(data.train), len(data.test), data.leaked, data.skipped) == (300, 100, 0, [])


def test_max_length_beyond_the_context(tokenizer):
    """Catches: positions that the model was never trained on."""
    sets = DatasetConfig(source="synthetic", count=1)
    config = DataConfig(train=sets, test=sets, max_length=100)
    with pytest.raises(InputError, match=r"data\.max_length 100 is longer than .* 99 tokens"):
        prepare(config, tokenizer, context_length=99)


def test_nothing_left_to_train_on(tokenizer, write_jsonl):
    """Catches: training on the test file, noticed only by an empty loop."""
    same = DatasetConfig(source="file", path=str(write_jsonl([row(1), row(2)])))
    with pytest.raises(InputError, match="training set is empty: 2 examples loaded, 2 of them are test"):
        prepare(DataConfig(train=same, test=same), tokenizer, None)


def test_no_prompt_fits(tokenizer, write_jsonl):
    """Catches: a score of 0 out of 0."""
    same = DatasetConfig(source="file", path=str(write_jsonl([row(1)])))
    config = DataConfig(train=same, test=same, max_length=8, bad_rows="skip")
    with pytest.raises(InputError, match=r"no prompt fits into data\.max_length 8"):
        load_test(config, tokenizer)


def file_config(train, test, **settings) -> DataConfig:
    """Both sets from files, in the order of the files."""
    limit = settings.pop("limit", None)
    return DataConfig(
        train=DatasetConfig(source="gsm8k", path=str(train), split="test", limit=limit),
        test=DatasetConfig(source="gsm8k", path=str(test), split="test"),
        **{"max_length": 80, **settings},
    )


def numbers(examples) -> list[int]:
    """The rows that examples were made of, by their place in the file."""
    return [int(example.origin.rpartition(":")[2]) - 1 for example in examples]


def worked(i: int) -> dict[str, str]:
    return {"question": f"What is {i} + 1?", "answer": f"#### {i + 1}"}


def test_validation_examples_are_the_last_ones_and_are_not_trained_on(tokenizer, write_jsonl):
    """Catches: a validation example, or a copy of its question, in the training set; a test question among
    them; other examples for a smaller training set; a key that changes a run that does not set it."""
    copy = {**worked(8), "question": "what is 8 + 1"}
    train = write_jsonl(
        [worked(0), worked(1), copy, worked(3), worked(4), worked(9), worked(8), worked(7), worked(9)],
        "train.jsonl",
    )
    test = write_jsonl([worked(9), worked(1)], "test.jsonl")
    plain = prepare(file_config(train, test), tokenizer, None)
    assert numbers(plain.train) == [0, 2, 3, 4, 6, 7]
    assert (plain.validation, plain.leaked_validation) == ([], 0)
    assert plain.counts().keys() == {
        *("fingerprints", "train", "test", "leaked_questions_removed", "rows_skipped")
    }
    data = prepare(file_config(train, test, validation=2), tokenizer, None)
    assert numbers(data.validation) == [6, 7]
    assert numbers(data.train) == [0, 3, 4]
    assert (data.leaked, data.leaked_validation) == (3, 1)
    counts = data.counts()
    assert (counts["validation"], counts["leaked_validation_questions_removed"]) == (2, 1)
    assert counts["fingerprints"] == data.fingerprints
    assert len({*data.fingerprints.values()}) == 3

    small = prepare(file_config(train, test, validation=2, limit=4), tokenizer, None)
    assert numbers(small.train) == [0, 3]
    assert (small.leaked, small.leaked_validation) == (1, 1)
    assert small.fingerprints["validation"] == data.fingerprints["validation"]
    overlapping = prepare(file_config(train, test, validation=2, limit=7), tokenizer, None)
    assert numbers(overlapping.train) == [0, 3, 4]

    other = prepare(file_config(train, test, validation=1), tokenizer, None)
    assert other.fingerprints["validation"] != data.fingerprints["validation"]
    with pytest.raises(InputError, match=r"data\.validation 6 leaves nothing to train on: there are 6 train"):
        prepare(file_config(train, test, validation=6), tokenizer, None)


def test_a_fraction_for_validation(tokenizer, write_jsonl):
    """Catches: a fraction taken of the rows with the test questions, of the limited rows, or cut to none."""
    train = write_jsonl([worked(i) for i in range(40)], "train.jsonl")
    test = write_jsonl([worked(i) for i in range(38, 60)], "test.jsonl")
    data = prepare(file_config(train, test, validation=0.1, limit=10), tokenizer, None)
    assert numbers(data.validation) == [34, 35, 36, 37]
    assert (
        data.fingerprints
        == prepare(file_config(train, test, validation=4, limit=10), tokenizer, None).fingerprints
    )
    assert numbers(prepare(file_config(train, test, validation=0.001), tokenizer, None).validation) == [37]
    with pytest.raises(InputError, match=r"data\.validation 0\.999 leaves nothing to train on"):
        prepare(file_config(train, test, validation=0.999), tokenizer, None)


def test_a_source_for_validation(tokenizer, write_jsonl):
    """Catches: a validation question in the training set, a test question in the validation set, a number
    that the manifest lacks, a source that `evaluate --split validation` does not score."""
    train = write_jsonl([worked(i) for i in range(6)], "train.jsonl")
    test = write_jsonl([worked(0), worked(9)], "test.jsonl")
    rows = [worked(9), {**worked(2), "question": "what is 2 + 1"}, worked(7)]
    own = {"source": "gsm8k", "path": str(write_jsonl(rows, "own.jsonl")), "split": "test"}
    config = file_config(train, test, validation=own)
    data = prepare(config, tokenizer, None)
    assert numbers(data.train) == [1, 3, 4, 5]
    assert [example.answer for example in data.validation] == ["3", "8"]
    counts = data.counts()
    removed = ("leaked_questions_removed", "leaked_validation_questions_removed")
    assert [counts[key] for key in (*removed, "validation", "test_questions_removed_from_validation")] == [
        1,
        1,
        2,
        1,
    ]
    assert load_split(config, tokenizer, "validation").examples == data.validation
    all_test = {**own, "path": str(write_jsonl([worked(9)], "none.jsonl"))}
    with pytest.raises(InputError, match="the validation set is empty: the questions of all 1 examples"):
        prepare(file_config(train, test, validation=all_test), tokenizer, None)
    with pytest.raises(InputError, match=r"data\.validation: source 'file' needs a path"):
        prepare(file_config(train, test, validation={"source": "file"}), tokenizer, None)


def test_the_validation_split_for_evaluation_is_that_of_training(tokenizer, write_jsonl):
    """Catches: other examples scored than were left out; a prompt that is too long for an answer scored."""
    rows = [worked(0), worked(1), {**worked(2), "question": "x " * 200}, worked(3)]
    train, test = write_jsonl(rows, "train.jsonl"), write_jsonl([worked(9)], "test.jsonl")
    config = file_config(train, test, validation=2, bad_rows="skip")
    data = prepare(config, tokenizer, None)
    assert numbers(data.validation) == [3]
    assert [skipped.origin for skipped in data.skipped] == [f"{train}:3"]
    assert load_split(config, tokenizer, "validation").examples == data.validation
    assert load_split(config, tokenizer, "test").examples == data.test
    with pytest.raises(DataError, match=r"train\.jsonl:3: the prompt alone has"):
        load_split(config.model_copy(update={"bad_rows": "stop"}), tokenizer, "validation")
    with pytest.raises(InputError, match=r"there is no validation set: data.validation is null"):
        load_split(config.model_copy(update={"validation": None}), tokenizer, "validation")
