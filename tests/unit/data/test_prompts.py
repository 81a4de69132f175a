"""Prompts: the declared wording, and one way to ids."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qdora.config import PromptName
from qdora.data import tokenize as templates
from qdora.data.tokenize import PROMPTS
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
