"""Prompts: the declared wording, and one way to ids."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qdora.config import PromptName
from qdora.data import tokenize as templates
from qdora.data.templates import PROMPTS
from qdora.errors import InputError


def prompt_ids(tokenizer, template_name, question):
    """The ids of one question."""
    return templates.prompt_ids(tokenizer, template_name, [question])[0]


def test_table_is_the_configuration():
    """Catches: a template that can be configured and does not exist, or the other way round."""
    assert set(PROMPTS) == set(get_args(PromptName))
    assert all(template.provenance for template in PROMPTS.values())
    assert all(t.text is None or t.text.count("{question}") == 1 for t in PROMPTS.values())


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("question_answer", "<s>###Question:\nWhat is {x}?\n###Answer:\n"),
        (
            "alpaca",
            "<s>Below is an instruction that describes a task. Write a response that appropriately completes "
            "the request.\n\n### Instruction:\nWhat is {x}?\n\n### Response:\n",
        ),
        ("cloze", "<s>Question: What is {x}?\nAnswer:"),
        ("chat", "<s>[user]What is {x}?[assistant]"),
    ],
)
def test_wording(tokenizer, name, text):
    """Catches: a changed published wording, BOS missing or doubled, braces in a question read as fields."""
    assert tokenizer.decode(prompt_ids(tokenizer, name, "What is {x}?")) == text


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
@given(questions=st.lists(st.text(max_size=20), max_size=4), name=st.sampled_from(sorted(PROMPTS)))
def test_batch_equals_single(tokenizer, questions, name):
    """Catches: training (many at once) and evaluation (one) that see different prompt ids."""
    many = templates.prompt_ids(tokenizer, name, questions)
    assert many == [prompt_ids(tokenizer, name, question) for question in questions]
    assert all(ids.count(tokenizer.bos_token_id) == 1 for ids in many)


def test_prompt_does_not_end_in_eos(make_tokenizer):
    """Catches: a tokenizer that closes every text with EOS, after which the model answers nothing."""
    closing = make_tokenizer(closes_with_eos=True)
    ids = prompt_ids(closing, "question_answer", "Why?")
    assert ids[-1] != closing.eos_token_id
    assert closing.decode(ids) == "<s>###Question:\nWhy?\n###Answer:\n"


def test_chat_without_template(make_tokenizer):
    """Catches: a base model's tokenizer that fails in the middle of a run."""
    with pytest.raises(InputError, match="no chat template; use one of: question_answer, alpaca"):
        prompt_ids(make_tokenizer(), "chat", "Why?")


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{% if %}"])
def test_chat_with_a_failing_template(tokenizer, template):
    """Catches: a template error shown as a traceback of the template engine."""
    tokenizer.chat_template = template
    with pytest.raises(InputError, match="the tokenizer's chat template fails"):
        prompt_ids(tokenizer, "chat", "Why?")


def test_unknown_template(tokenizer):
    """Catches: a misspelt template that falls back to another one."""
    with pytest.raises(InputError, match="'alpacca'; did you mean 'alpaca'"):
        prompt_ids(tokenizer, "alpacca", "Why?")


SHOTS = [("What is 1 + {x}?", "1 + 1 = 2."), ("Why?", "So.")]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "question_answer",
            "<s>###Question:\nWhat is 1 + {x}?\n###Answer:\n1 + 1 = 2.\n\n"
            "###Question:\nWhy?\n###Answer:\nSo.\n\n###Question:\nWho?\n###Answer:\n",
        ),
        (
            "cloze",
            "<s>Question: What is 1 + {x}?\nAnswer: 1 + 1 = 2.\n\nQuestion: Why?\nAnswer: So.\n\n"
            "Question: Who?\nAnswer:",
        ),
        (
            "chat",
            "<s>[user]What is 1 + {x}?[assistant]1 + 1 = 2.[user]Why?[assistant]So.[user]Who?[assistant]",
        ),
    ],
)
def test_shots_stand_before_the_question(tokenizer, name, text):
    """Catches: shots without their answers, in another order, or without the blank line that ends one."""
    (ids,) = templates.prompt_ids(tokenizer, name, ["Who?"], shots=SHOTS)
    assert tokenizer.decode(ids) == text


def test_a_template_with_text_says_how_another_question_begins():
    """Catches: a template whose next question no answer is cut at, or that begins otherwise."""
    for template in PROMPTS.values():
        if template.text is not None:
            assert template.next_question
            assert template.render("Q", [("A", "B")]).count(template.next_question) == 1


def test_text_of_special_tokens_in_shots_stays_text(tokenizer):
    """Catches: a shot whose </s> ends the prompt; a turn that a chat's shot opens."""
    for name in ("question_answer", "cloze", "chat"):
        (ids,) = templates.prompt_ids(tokenizer, name, ["Who?"], shots=[("a</s>b", "c <s>")])
        assert ids.count(tokenizer.eos_token_id) == 0
        assert ids.count(tokenizer.bos_token_id) == 1
        special = {"parse_special_tokens": True, "shots": [("a</s>b", "c <s>")]}
        (ids,) = templates.prompt_ids(tokenizer, name, ["Who?"], **special)
        assert ids.count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize("name", ["question_answer", "alpaca", "cloze"])
def test_continuations_are_those_of_the_joined_text(tokenizer, name):
    """Catches: a space lost between prompt and option, or tokenized apart from the word behind it; the line
    break before an option left out of what is scored, where lm-evaluation-harness has it."""
    template = PROMPTS[name]
    (found,) = templates.continued_ids(tokenizer, name, ["What is left?"], [["apples", "7"]], shots=SHOTS)
    prompt, continuations = found
    text = template.render("What is left?", SHOTS)
    assert tokenizer.decode(prompt) == "<s>" + text.rstrip()
    for ids, option in zip(continuations, ("apples", "7"), strict=True):
        assert prompt + ids == tokenizer(text + option)["input_ids"]
        assert tokenizer.decode(ids) == text[len(text.rstrip()) :] + option


def test_continuations_with_text_of_special_tokens(make_tokenizer):
    """Catches: options of one question whose prompts differ; EOS behind an option, where the tokenizer
    closes every text."""
    closing = make_tokenizer(closes_with_eos=True)
    ((prompt, found),) = templates.continued_ids(closing, "cloze", ["Why?"], [["a</s>", "b"]])
    assert [closing.decode(ids) for ids in found] == [" a</s>", " b"]
    assert closing.eos_token_id not in [*prompt, *found[0], *found[1]]


def test_continuations_of_a_chat_are_those_that_are_trained(tokenizer):
    """Catches: a chat prompt without the line that the assistant's turn begins with; nothing ranked."""
    ((prompt, (ids, _)),) = templates.continued_ids(tokenizer, "chat", ["Why?"], [["So.", "No"]])
    assert tokenizer.decode(prompt) == "<s>[user]Why?[assistant]"
    assert tokenizer.decode(ids) == "So."
    with pytest.raises(InputError, match="'' has no tokens behind its prompt"):
        templates.continued_ids(tokenizer, "chat", ["Why?"], [["So.", ""]])
