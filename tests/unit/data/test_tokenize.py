"""Tokenization: what is trained, what is too long, what pads."""

from __future__ import annotations

import pytest

from qdora.data.padding import choose_pad_token
from qdora.data.tokenize import continued_ids, fitting_prompts, prompt_ids, tokenize_examples
from qdora.errors import DataError, InputError


def test_ids(tokenizer, example):
    """Catches: prompt ids other than at generation, special tokens inside, EOS missing or doubled."""
    examples = [example(f"What is {i}?", f"It is {i}.", origin=f"f:{i}") for i in range(3)]
    found, skipped = tokenize_examples(examples, tokenizer, "question_answer", 100, "stop")
    assert not skipped
    for tokens, source in zip(found, examples, strict=True):
        ids, split = tokens.input_ids, tokens.prompt_length
        assert [ids[:split]] == prompt_ids(tokenizer, "question_answer", [source.question])
        assert tokenizer.decode(ids[split:]) == source.completion + "</s>"
        assert tokens.origin == source.origin


def test_a_template_that_joins_is_trained_as_it_is_ranked(tokenizer, example):
    """Catches: `Answer:the` trained, or a space of its own before the answer, which no evaluation sees."""
    source = example("What is left?", "apples left.")
    (tokens,), _ = tokenize_examples([source], tokenizer, "cloze", 100, "stop")
    joined = tokenizer("Question: What is left?\nAnswer: apples left.")["input_ids"]
    assert tokens.input_ids == [*joined, tokenizer.eos_token_id]
    ((prompt, (continuation,)),) = continued_ids(tokenizer, "cloze", [source.question], [[source.completion]])
    assert tokens.input_ids[: tokens.prompt_length] == prompt
    assert tokens.input_ids[tokens.prompt_length : -1] == continuation
    assert [prompt] == prompt_ids(tokenizer, "cloze", [source.question])


def test_completion_of_a_closing_tokenizer_has_one_eos(make_tokenizer, example):
    """Catches: EOS trained twice where the tokenizer adds one itself."""
    closing = make_tokenizer(closes_with_eos=True)
    (tokens,), _ = tokenize_examples([example()], closing, "alpaca", 200, "stop")
    assert tokens.input_ids.count(closing.eos_token_id) == 1
    assert tokens.input_ids[-1] == closing.eos_token_id


def test_many_chunks_keep_the_order(tokenizer, example, monkeypatch):
    """Catches: examples lost or exchanged at the border of a chunk."""
    monkeypatch.setattr("qdora.data.tokenize._CHUNK", 3)
    examples = [example(f"q {i}", origin=f"f:{i}") for i in range(8)]
    found, _ = tokenize_examples(examples, tokenizer, "question_answer", 100, "stop")
    assert [tokens.origin for tokens in found] == [e.origin for e in examples]


def test_too_long(tokenizer, example):
    """Catches: a cut answer, EOS not counted, a bad row without origin or lengths."""
    examples = [example(origin="f:1"), example(completion="3 + 4 = 7. So it is 7.", origin="f:2")]
    lengths = [
        len(t.input_ids) for t in tokenize_examples(examples, tokenizer, "question_answer", 500, "stop")[0]
    ]
    found, skipped = tokenize_examples(examples, tokenizer, "question_answer", lengths[0], "skip")
    assert [len(tokens.input_ids) for tokens in found] == lengths[:1]
    assert [s.origin for s in skipped] == ["f:2"]
    assert f"{lengths[1]} tokens" in skipped[0].reason
    assert f"data.max_length {lengths[0]}" in skipped[0].reason
    with pytest.raises(DataError, match=f"^f:2: {lengths[1]} tokens"):
        tokenize_examples(examples, tokenizer, "question_answer", lengths[0], "stop")


def test_no_tokens(tokenizer, example, monkeypatch):
    """Catches: an example of which only EOS is trained."""
    monkeypatch.setattr(
        "qdora.data.tokenize._encode_completions", lambda _, texts, *rest: [[] for _ in texts]
    )
    with pytest.raises(DataError, match="file:1: no tokens"):
        tokenize_examples([example()], tokenizer, "question_answer", 100, "stop")


def test_fitting_prompts(tokenizer, example):
    """Catches: a test prompt that leaves no room for an answer, scored as wrong."""
    short, long = example("q", origin="f:1"), example("q " * 50, origin="f:2")
    kept, skipped = fitting_prompts([short, long], tokenizer, "question_answer", 60, "skip")
    assert kept == [short]
    assert [s.origin for s in skipped] == ["f:2"]
    with pytest.raises(DataError, match=r"^f:2: the prompt alone has"):
        fitting_prompts([short, long], tokenizer, "question_answer", 60, "stop")


def test_no_eos(make_tokenizer, example):
    """Catches: None appended to the ids."""
    endless = make_tokenizer(eos_token=None)
    with pytest.raises(InputError, match="no EOS token"):
        tokenize_examples([example()], endless, "question_answer", 100, "stop")
    with pytest.raises(InputError, match="no EOS token"):
        choose_pad_token(endless)


@pytest.mark.parametrize(
    ("roles", "extra", "expected"),
    [
        ({"pad_token": "<mine>", "unk_token": "<unk>"}, (), "<mine>"),
        ({"pad_token": "</s>", "unk_token": "<unk>"}, ("<pad>",), "<unk>"),
        ({"unk_token": "<unk>"}, (), "<unk>"),
        ({"unk_token": "</s>"}, ("<|reserved_special_token_0|>",), "<|reserved_special_token_0|>"),
        (
            {},
            ("<|reserved_special_token_0|>", "<|finetune_right_pad_id|>"),
            "<|finetune_right_pad_id|>",
        ),
        ({}, ("<|vision_pad|>",), "<|vision_pad|>"),
        ({"pad_token": "</s>"}, ("<image>",), "</s>"),
        ({}, (), "</s>"),
    ],
)
def test_pad_token(make_tokenizer, roles, extra, expected):
    """Catches: padding with EOS where another token is there, a grown vocabulary, a token left unset."""
    tokenizer = make_tokenizer(extra=extra, **roles)
    size = len(tokenizer)
    pad = choose_pad_token(tokenizer)
    assert tokenizer.convert_ids_to_tokens(pad) == expected
    assert tokenizer.pad_token == expected
    assert tokenizer.pad_token_id == pad
    assert len(tokenizer) == size
    assert choose_pad_token(tokenizer) == pad
