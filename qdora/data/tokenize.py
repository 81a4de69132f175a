"""Prompt templates, and examples as token ids, for training and evaluation."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from qdora.data.rows import BadRows, Example, Skipped, raise_for_skipped
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


_CHUNK = 1_000
"""Examples handed to the tokenizer at once: enough for its threads, little memory."""


@dataclass(frozen=True, slots=True)
class TokenizedExample:
    """Ids of prompt, completion and EOS; only those behind the prompt are trained."""

    input_ids: list[int]
    prompt_length: int
    origin: str


def tokenize_examples(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_length: int,
    bad_rows: BadRows,
) -> tuple[list[TokenizedExample], list[Skipped]]:
    """Tokenize for training.

    Prompt and completion are tokenized separately, so that training sees the prompt ids that generation
    will see, whatever the tokenizer would merge across their boundary.

    Args:
        prompt: name of the template.
        max_length: of prompt, completion and EOS in all; nothing is truncated.
        bad_rows: what to do with an example that is longer, or has no tokens.
    Raises:
        InputError: no EOS token, unknown or unusable template.
        DataError: a bad row, and `bad_rows` is `stop`.
    """
    eos = eos_id(tokenizer)
    kept: list[TokenizedExample] = []
    skipped: list[Skipped] = []
    for chunk, prompts in _chunks(examples, tokenizer, prompt):
        completions = _completion_ids(tokenizer, chunk)
        for example, before, after in zip(chunk, prompts, completions, strict=True):
            ids = [*before, *after, eos]
            if before and after and len(ids) <= max_length:
                kept.append(TokenizedExample(ids, len(before), example.origin))
                continue
            if not before or not after:
                reason = f"no tokens: the prompt has {len(before)}, the completion {len(after)}"
            else:
                reason = (
                    f"{len(ids)} tokens (prompt {len(before)}, completion {len(after)}, EOS 1), "
                    f"longer than data.max_length {max_length}"
                )
            skipped.append(Skipped(example.origin, reason))
    raise_for_skipped(skipped, bad_rows)
    return kept, skipped


def fitting_prompts(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_length: int,
    bad_rows: BadRows,
) -> tuple[list[Example], list[Skipped]]:
    """The examples whose prompt leaves room for at least one token of an answer.

    Raises:
        InputError: unknown or unusable template.
        DataError: a prompt does not fit, and `bad_rows` is `stop`.
    """
    kept: list[Example] = []
    skipped: list[Skipped] = []
    for chunk, prompts in _chunks(examples, tokenizer, prompt):
        for example, ids in zip(chunk, prompts, strict=True):
            if len(ids) < max_length:
                kept.append(example)
            else:
                reason = f"the prompt alone has {len(ids)} tokens, data.max_length is {max_length}"
                skipped.append(Skipped(example.origin, reason))
    raise_for_skipped(skipped, bad_rows)
    return kept, skipped


def _chunks(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, prompt: str
) -> Iterator[tuple[Sequence[Example], list[list[int]]]]:
    """Chunks of the examples, with the ids of their prompts."""
    for start in range(0, len(examples), _CHUNK):
        chunk = examples[start : start + _CHUNK]
        yield chunk, prompt_ids(tokenizer, prompt, [example.question for example in chunk])


def _completion_ids(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> list[list[int]]:
    texts = [example.completion for example in examples]
    encoded = tokenizer(texts, add_special_tokens=False, padding=False, truncation=False)
    return cast("list[list[int]]", encoded["input_ids"])


# Tokens that model families reserve for padding, or for nothing; the first one found is used.
_RESERVED = (
    "<|finetune_right_pad_id|>",
    "<pad>",
    "[PAD]",
    "<|pad|>",
    "<|padding|>",
    "<|pad_token|>",
    "<|reserved_special_token_0|>",
    "<|reserved_0|>",
    "<reserved_0>",
    "<unused0>",
)
_RESERVED_PATTERN = re.compile(r"[<\[]\|?[\w-]*(pad|reserved|unused)[\w-]*\|?[>\]]", re.IGNORECASE)


def choose_pad_token(tokenizer: PreTrainedTokenizerBase, rows: int | None = None) -> int:
    """Set `tokenizer.pad_token` and return its id; the vocabulary never grows.

    Where padding is EOS, masking labels by the pad id would leave EOS untrained, and the model would
    never learn to end.  In order: the tokenizer's own pad token, its unknown token, a token
    reserved for padding or for nothing, each only if it is not EOS; else EOS.

    Args:
        rows: of the model's embedding, where it is known; a token beyond them is not chosen.
    Raises: InputError: the tokenizer has no EOS token, or it is beyond the rows.
    """
    eos = eos_id(tokenizer)
    if rows is not None and eos >= rows:
        raise InputError(
            f"the tokenizer {tokenizer.name_or_path!r} ends texts with {tokenizer.eos_token!r}, whose id "
            f"{eos} is beyond the {rows} rows of the model's embedding; set eos_token to one that it has"
        )

    def usable(token_id: int | None) -> bool:
        return token_id is not None and token_id != eos and (rows is None or token_id < rows)

    if usable(tokenizer.pad_token_id):
        return int(tokenizer.pad_token_id)
    if usable(tokenizer.unk_token_id):
        tokenizer.pad_token = tokenizer.unk_token
    else:
        tokenizer.pad_token = _reserved_token(tokenizer, usable) or tokenizer.eos_token
    return int(tokenizer.pad_token_id)


def eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that ends a completion.

    Raises: InputError: the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__!r} has no EOS token, so a "
            "model could not learn to end its answer; set eos_token in its tokenizer_config.json"
        )
    return int(tokenizer.eos_token_id)


def _reserved_token(tokenizer: PreTrainedTokenizerBase, usable: Callable[[int | None], bool]) -> str | None:
    vocabulary = tokenizer.get_vocab()
    added = sorted(tokenizer.get_added_vocab())
    candidates = [*_RESERVED, *(token for token in added if _RESERVED_PATTERN.fullmatch(token))]
    return next((token for token in candidates if usable(vocabulary.get(token))), None)
