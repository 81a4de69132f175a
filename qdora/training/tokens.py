"""The tokens whose rows a run trains: their ids, the rows of the table, the tokenizer beside the adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qdora.adapters.peft_io import save_adapter
from qdora.adapters.tokens import add_special_tokens
from qdora.config import RunConfig
from qdora.data.vocabulary import embedding_rows
from qdora.models.formats import Checkpoint
from qdora.models.load import save_beside_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def save_adapter_and_tokenizer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path | None
) -> None:
    """Write the adapter, and beside it a tokenizer with tokens or a chat template of its own.

    Args:
        tokenizer: None where it is the base's.
        folder: None on the other ranks.
    """
    if folder is not None and tokenizer is not None:
        save_beside_adapter(folder, tokenizer)
    save_adapter(model, folder)  # last: with its weights it counts as complete


def trained_ids(tokenizer: PreTrainedTokenizerBase, checkpoint: Checkpoint, config: RunConfig) -> list[int]:
    """Ids of `adapter.trainable_tokens`, which are added to the tokenizer where it lacks them."""
    return add_special_tokens(
        tokenizer, config.adapter.trainable_tokens or (), embedding_rows(checkpoint.config)
    )


def table_rows(tokenizer: PreTrainedTokenizerBase, checkpoint: Checkpoint, config: RunConfig) -> int:
    """Rows of the embedding, with those for the tokens that are added."""
    ids = trained_ids(tokenizer, checkpoint, config)
    return max([embedding_rows(checkpoint.config), *(i + 1 for i in ids)])
