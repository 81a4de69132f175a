"""Prompt templates, and the one function from questions to prompt ids, for training and evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from qdora.errors import InputError, suggest


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """A declared template."""

    text: str | None
    """The prompt, with {question}; None: the tokenizer's own chat template."""
    provenance: str


PROMPTS: Mapping[str, PromptTemplate] = {
    "question_answer": PromptTemplate(
        "###Question:\n{question}\n###Answer:\n",
        "The published Orca-Math runs, fsdp_qlora train.py and experiments/orca_math/evaluate.ipynb.",
    ),
    "alpaca": PromptTemplate(
        "Below is an instruction that describes a task. Write a response that appropriately completes "
        "the request.\n\n### Instruction:\n{question}\n\n### Response:\n",
        "Stanford Alpaca's wording, which LLM-Adapters uses.  LLM-Adapters' code indents every line by 16 "
        "spaces and trains, but does not evaluate, with a stray code comment in the first line; neither is "
        "repeated here.",
    ),
    "chat": PromptTemplate(
        None, "The tokenizer's chat template: one user turn and the header of the assistant's."
    ),
}


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, template_name: str, questions: Sequence[str]
) -> list[list[int]]:
    """For each question the ids after which the model writes its answer.

    Raises: InputError: unknown template, or `chat` with a tokenizer that has no usable one.
    """
    template = PROMPTS.get(template_name)
    if template is None:
        raise InputError(f"prompt template {template_name!r}; {suggest(template_name, PROMPTS)}")
    if not questions:
        return []
    if template.text is None:
        return _chat_ids(tokenizer, questions)
    # replace, not format: a question may hold braces, and format would read a template's own.
    texts = [template.text.replace("{question}", question) for question in questions]
    encoded: list[list[int]] = tokenizer(texts, padding=False, truncation=False)["input_ids"]
    # Some tokenizers are set to close every text with EOS; after that there is nothing to answer.
    return [ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids for ids in encoded]


def _chat_ids(tokenizer: PreTrainedTokenizerBase, questions: Sequence[str]) -> list[list[int]]:
    if not tokenizer.chat_template:
        others = ", ".join(name for name, template in PROMPTS.items() if template.text is not None)
        raise InputError(f"prompt 'chat': this tokenizer has no chat template; use one of: {others}")
    conversations = [[{"role": "user", "content": question}] for question in questions]
    try:
        encoded = tokenizer.apply_chat_template(
            conversations, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    except TemplateError as error:
        raise InputError(f"prompt 'chat': the tokenizer's chat template fails: {error}") from error
    return cast(list[list[int]], encoded)
