"""The tokens that end a text and that fill a batch up."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from qdora.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end an answer: the tokenizer's and those of the model's generation config."""
    of_model = getattr(model.generation_config, "eos_token_id", None)
    of_model = of_model if isinstance(of_model, (list, tuple)) else [of_model]
    return sorted({int(i) for i in (tokenizer.eos_token_id, *of_model) if i is not None})


def _reserved_token(tokenizer: PreTrainedTokenizerBase, usable: Callable[[int | None], bool]) -> str | None:
    vocabulary = tokenizer.get_vocab()
    added = sorted(tokenizer.get_added_vocab())
    candidates = [*_RESERVED, *(token for token in added if _RESERVED_PATTERN.fullmatch(token))]
    return next((token for token in candidates if usable(vocabulary.get(token))), None)
