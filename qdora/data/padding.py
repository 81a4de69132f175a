"""The pad token: one that is not EOS where the tokenizer has such a token."""

from __future__ import annotations

import re

from transformers import PreTrainedTokenizerBase

from qdora.errors import InputError

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


def choose_pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Set `tokenizer.pad_token` and return its id; the vocabulary never grows.

    Where padding is EOS, whoever masks labels by the pad id stops training EOS, and the model
    never learns to end.  In order: the tokenizer's own pad token, its unknown token, a token
    reserved for padding or for nothing, each only if it is not EOS; else EOS.

    Raises: InputError: the tokenizer has no EOS token.
    """
    eos = eos_id(tokenizer)
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != eos:
        return int(tokenizer.pad_token_id)
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id != eos:
        tokenizer.pad_token = tokenizer.unk_token
    else:
        tokenizer.pad_token = _reserved_token(tokenizer, eos) or tokenizer.eos_token
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


def _reserved_token(tokenizer: PreTrainedTokenizerBase, eos: int) -> str | None:
    vocabulary = tokenizer.get_vocab()
    added = sorted(tokenizer.get_added_vocab())
    candidates = [*_RESERVED, *(token for token in added if _RESERVED_PATTERN.fullmatch(token))]
    return next((token for token in candidates if vocabulary.get(token, eos) != eos), None)
