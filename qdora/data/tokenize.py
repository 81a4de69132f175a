"""From examples to ids: the prompt, the completion, EOS."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from qdora.data.bad_rows import BadRows, settle
from qdora.data.example import Example, Skipped
from qdora.data.padding import choose_pad_token, eos_id
from qdora.data.prompts import prompt_ids_of_all

__all__ = ["TokenizedExample", "choose_pad_token", "fitting_prompts", "tokenize_examples"]

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

    Prompt and completion are tokenized apart, so that training sees the prompt ids that
    generation will see, whatever the tokenizer would merge across the seam.

    Args:
        prompt: name of the template.
        max_length: of prompt, completion and EOS together; nothing is ever cut.
        bad_rows: what to do with an example that is longer, or has no tokens.
    Raises:
        InputError: no EOS token, unknown or unusable template.
        DataError: a bad row, and `bad_rows` is `stop`.
    """
    eos = eos_id(tokenizer)
    kept: list[TokenizedExample] = []
    skipped: list[Skipped] = []
    for chunk in _chunks(examples):
        prompts = prompt_ids_of_all(tokenizer, prompt, [example.question for example in chunk])
        completions = _completion_ids(tokenizer, chunk)
        for example, before, after in zip(chunk, prompts, completions, strict=True):
            reason = _problem(len(before), len(after), max_length)
            if reason is not None:
                skipped.append(Skipped(example.origin, reason))
            else:
                kept.append(TokenizedExample([*before, *after, eos], len(before), example.origin))
    settle(skipped, bad_rows)
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
    for chunk in _chunks(examples):
        prompts = prompt_ids_of_all(tokenizer, prompt, [example.question for example in chunk])
        for example, ids in zip(chunk, prompts, strict=True):
            if len(ids) < max_length:
                kept.append(example)
            else:
                reason = f"the prompt alone has {len(ids)} tokens, data.max_length is {max_length}"
                skipped.append(Skipped(example.origin, reason))
    settle(skipped, bad_rows)
    return kept, skipped


def _chunks(examples: Sequence[Example]) -> Iterator[Sequence[Example]]:
    return (examples[i : i + _CHUNK] for i in range(0, len(examples), _CHUNK))


def _completion_ids(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> list[list[int]]:
    texts = [example.completion for example in examples]
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, padding=False, truncation=False)[
        "input_ids"
    ]
    return ids


def _problem(prompt: int, completion: int, max_length: int) -> str | None:
    if not prompt or not completion:
        return f"no tokens: the prompt has {prompt}, the completion {completion}"
    total = prompt + completion + 1
    if total > max_length:
        return (
            f"{total} tokens (prompt {prompt}, completion {completion}, EOS 1), "
            f"longer than data.max_length {max_length}"
        )
    return None
