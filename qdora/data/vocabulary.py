"""Token ids against the rows of a model's embedding: a tokenizer with tokens added to it may have more."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from qdora.config import DataConfig
from qdora.data.padding import choose_pad_token
from qdora.data.rows import Example
from qdora.data.tokenize import prompt_ids
from qdora.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


def embedding_rows(config: PreTrainedConfig) -> int:
    """Rows of the embedding of a causal language model."""
    return int(config.get_text_config().vocab_size)


def fit_padding(tokenizer: PreTrainedTokenizerBase, rows: int) -> str | None:
    """Choose a pad token that has a row; a sentence where the tokenizer's own has none.

    Raises: InputError: the tokenizer has no EOS token, or its EOS token has no row.
    """
    own, own_id = tokenizer.pad_token, tokenizer.pad_token_id
    choose_pad_token(tokenizer, rows)
    if own_id is None or own_id < rows:
        return None
    return (
        f"the tokenizer pads with {own!r}, whose id {own_id} is beyond the {rows} rows of the model's "
        f"embedding; {tokenizer.pad_token!r} pads instead, which changes no result: padding is masked"
    )


def check_ids(
    tokenizer: PreTrainedTokenizerBase, rows: int, sequences: Iterable[tuple[str, Sequence[int]]]
) -> None:
    """Compare token ids with the rows of the embedding that they choose.

    Args:
        sequences: origin and token ids of each; not read where every id of the vocabulary has a row.
    Raises: DataError: an id has no row; the origin, the token and the id are named.
    """
    if not _exceeds(tokenizer, rows):
        return
    for origin, ids in sequences:
        if max(ids, default=0) >= rows:
            token = tokenizer.convert_ids_to_tokens(max(ids))
            raise DataError(
                f"{origin}: token {token!r} has id {max(ids)}, but the model's embedding has {rows} rows, of "
                f"ids 0 to {rows - 1}: the token was added to the tokenizer and not to the model. Remove it "
                f"from the text or the tokenizer, name it in adapter.trainable_tokens, or resize the model's "
                f"embeddings"
            )


def check_questions(
    tokenizer: PreTrainedTokenizerBase, rows: int, config: DataConfig, examples: Sequence[Example]
) -> None:
    """`check_ids` of the prompts of examples, which are tokenized for it only where one could be refused.

    Raises: DataError: as `check_ids`.
    """
    if _exceeds(tokenizer, rows):
        questions = [example.asked for example in examples]
        special = config.parse_special_tokens
        ids = prompt_ids(tokenizer, config.prompt, questions, parse_special_tokens=special)
        check_ids(tokenizer, rows, zip([example.origin for example in examples], ids, strict=True))


def _exceeds(tokenizer: PreTrainedTokenizerBase, rows: int) -> bool:
    return max(tokenizer.get_vocab().values(), default=0) >= rows
