"""Texts as token ids, in which the text of a special token may be ordinary text."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar, cast

from qdora.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")


def special_tokens(tokenizer: PreTrainedTokenizerBase, *, added: bool = False) -> re.Pattern[str]:
    """Finds the texts of a tokenizer's special tokens, longer ones first; with `added`, of all added ones."""
    tokens = tokenizer.added_tokens_decoder.values()
    texts = {token.content for token in tokens if token.special or added}
    longest_first = sorted((text for text in texts if text.strip()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def marked_texts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], parse_special_tokens: bool, added: bool = False
) -> list[bool]:
    """Which texts hold the text of a special token that is to stay text; all others are encoded as ever."""
    tokens = special_tokens(tokenizer, added=added)
    return [not parse_special_tokens and tokens.search(text) is not None for text in texts]


def encode_texts(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    marked: Sequence[bool],
    *,
    add_special_tokens: bool,
) -> list[list[int]]:
    """The ids of texts; in the marked ones special tokens are text.

    Raises: InputError: as `prompt_ids`.
    """

    def encode(texts: list[str], as_text: bool, added: bool = add_special_tokens) -> list[list[int]]:
        encoding = tokenizer(
            texts, add_special_tokens=added, split_special_tokens=as_text, padding=False, truncation=False
        )
        return cast("list[list[int]]", encoding["input_ids"])

    held = [text for text, mark in zip(texts, marked, strict=True) if mark]
    # Without the tokens that the tokenizer adds: only what comes of the text is looked at.
    for text, ids in zip(held, encode(held, True, False) if held else [], strict=True):
        for token in special_tokens(tokenizer).findall(text):
            if token != tokenizer.unk_token and tokenizer.convert_tokens_to_ids(token) in ids:
                raise InputError(cannot_be_text(token))
    return by_mark(texts, marked, encode)


def by_mark(
    items: Sequence[T], marked: Sequence[bool], encode: Callable[[list[T], bool], list[list[int]]]
) -> list[list[int]]:
    """The ids of all items, of which the marked ones are encoded apart."""
    encoded: list[list[int]] = [[] for _ in items]
    for mark in {*marked}:
        chosen = [i for i, each in enumerate(marked) if each == mark]
        for i, ids in zip(chosen, encode([items[i] for i in chosen], mark), strict=True):
            encoded[i] = ids
    return encoded


def cannot_be_text(token: str) -> str:
    """What to say where a tokenizer does not split the text of a special token."""
    return (
        f"this tokenizer makes a special token of {token!r} even where it is ordinary text; remove it from "
        "the data, or set data.parse_special_tokens: true where the token is meant"
    )
