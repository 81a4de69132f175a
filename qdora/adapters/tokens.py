"""Trained rows of the embedding and the output layer: tokens that were added, or get another meaning.

The tables stay frozen.  A row is its frozen start plus a trained offset, as a magnitude is.  With tied
weights the embedding and the output layer have the same rows.

K trained tokens   V rows of the table   I hidden size
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from qdora.adapters.base import AdapterModule, adapter_parameter, full_tensor, widened
from qdora.adapters.layer import OutputLinear
from qdora.adapters.vocabulary import vocabulary_layers
from qdora.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SETTING = "trainable_token_indices"
SUFFIX = ".token_adapter.trainable_tokens_delta"
"""PEFT's names of the setting and, after that of the layer, of the rows."""


class TokenRows(AdapterModule):
    """The rows of some tokens, initial + offset.

    Attributes:
        ids: of the tokens.
        initial_KI: float32, frozen.
        base_rows: of the table before it grew.
        offset_KI: parameter, zero at the start.
        enabled: False leaves the table as it is.
    """

    ids_K: torch.Tensor
    slot_V: torch.Tensor
    initial_KI: torch.Tensor

    def __init__(self, ids: Sequence[int], initial_KI: torch.Tensor, rows: int, storage: torch.dtype) -> None:
        super().__init__()
        self.ids, self.storage, self.enabled = tuple(ids), storage, True
        self.base_rows = rows
        device = initial_KI.device
        ids_K = torch.tensor(self.ids)
        slot_V = torch.full((max(rows, max(ids) + 1),), -1)
        slot_V[ids_K] = torch.arange(len(self.ids))
        self.register_buffer("ids_K", ids_K.to(device), persistent=False)
        self.register_buffer("slot_V", slot_V.to(device), persistent=False)
        self.register_buffer("initial_KI", initial_KI.float(), persistent=False)
        self.offset_KI = adapter_parameter(torch.zeros_like(initial_KI, dtype=storage))

    def initial(self, name: str) -> torch.Tensor:
        """Offsets of zero."""
        return torch.zeros(self.initial_KI.shape)

    def rows(self, dtype: torch.dtype) -> torch.Tensor:
        """(K, I), differentiable."""
        return (self.initial_KI + widened(self.offset_KI, torch.float32)).to(dtype)

    def value(self) -> torch.Tensor:
        """(K, I) float32, detached."""
        return self.initial_KI + full_tensor(self.offset_KI, self.storage).float()

    def load(self, rows_KI: torch.Tensor) -> None:
        """Start from given rows: they become the frozen part, exactly."""
        self.initial_KI.copy_(rows_KI)
        self.reset_parameters()

    def into(self, table_VI: torch.Tensor) -> torch.Tensor:
        """A float32 copy of the table with the trained rows in it, grown to have them."""
        grown_VI = table_VI.new_zeros(len(self.slot_V), table_VI.shape[1], dtype=torch.float32)
        grown_VI[: len(table_VI)] = table_VI
        return grown_VI.index_copy_(0, self.ids_K.to(table_VI.device), self.value().to(table_VI.device))

    def replace_logits(self, x_NI: torch.Tensor, y_NV: torch.Tensor, bias_V: torch.Tensor | None) -> None:
        """Write the logits of these tokens, from the inputs of the output layer, over the table's."""
        if self.enabled:
            bias_K = None if bias_V is None else bias_V[self.ids_K]
            y_NV.index_copy_(-1, self.ids_K, F.linear(x_NI, self.rows(x_NI.dtype), bias_K))
        else:
            y_NV[..., self.base_rows :] = -torch.inf  # tokens that the base does not have

    def embed(self, ids: torch.Tensor, rows_of_table: torch.Tensor, scale: Any = None) -> torch.Tensor:
        """The embedding of ids (...): the trained rows in place of the table's (..., I)."""
        if not self.enabled:
            return rows_of_table
        slot = self.slot_V[ids]
        rows_KI = self.rows(rows_of_table.dtype)
        if scale is not None:
            rows_KI = rows_KI * torch.as_tensor(scale, device=rows_KI.device).to(rows_KI.dtype)
        return torch.where((slot >= 0)[..., None], rows_KI[slot.clamp_min(0)], rows_of_table)


def token_rows(model: nn.Module) -> dict[str, TokenRows]:
    """The trained rows by full name of their layer; tied ones once, under the embedding's."""
    found = {name: getattr(layer, "token_rows", None) for name, layer in vocabulary_layers(model).items()}
    own: dict[str, TokenRows] = {}
    for name, rows in found.items():
        if rows is not None and all(rows is not other for other in own.values()):
            own[name] = rows
    return own


def add_special_tokens(tokenizer: PreTrainedTokenizerBase, names: Collection[str], rows: int) -> list[int]:
    """Ids of the rows to train for some tokens; those that a tokenizer lacks are added as special tokens.

    Args:
        rows: of the base's table.  Those that it grows by to reach the tokens are trained, without exception.
    Returns: ascending; empty where no token is named.
    Raises: InputError: a token is named twice.
    """
    if len({*names}) != len(names):
        raise InputError(f"adapter.trainable_tokens: {', '.join(names)}: a token is named twice")
    vocabulary = tokenizer.get_vocab()
    tokenizer.add_tokens([name for name in names if name not in vocabulary], special_tokens=True)
    vocabulary = tokenizer.get_vocab()
    ids = [vocabulary[name] for name in names]
    return sorted({*ids, *range(rows, max(ids, default=0) + 1)})


@torch.no_grad()
def train_tokens(model: nn.Module, ids: Sequence[int], storage: torch.dtype) -> int:
    """Train rows of the embedding and the output layer, whose tables grow where they lack one.

    A token that the tables lack, or whose row is all zero, starts at the mean of the table's rows; any
    other at its own row.

    Args:
        model: not sharded; on the meta device only shapes are made.
        storage: dtype of the offsets.
    Returns: parameters that are trained more.
    Raises: InputError: the output layer has an adapter, or is no linear layer of ours.
    """
    embedding, output = _layers(model)
    tied = output is None or output.weight is embedding.weight
    vocabulary, total = embedding.weight.shape[0], 0
    size = max(vocabulary, max(ids) + 1)
    previous: TokenRows | None = None
    for layer in (embedding,) if output is None else (embedding, output):
        table_VI = layer.weight.detach()
        if not (tied and previous is not None):
            previous = TokenRows(ids, _start(table_VI, ids), vocabulary, storage)
            total += previous.offset_KI.numel()
            if size > vocabulary:
                grown_VI = torch.cat([table_VI, table_VI.new_zeros(size - vocabulary, table_VI.shape[1])])
                weight = nn.Parameter(grown_VI, requires_grad=False)
        if size > vocabulary:
            layer.weight = weight
        assert previous is not None
        layer.add_module("token_rows", previous)
    if isinstance(output, nn.Linear) and size > vocabulary:
        output.out_features = size
        if output.bias is not None:
            bias_V = torch.cat([output.bias.detach(), output.bias.new_zeros(size - vocabulary)])
            output.bias = nn.Parameter(bias_V, requires_grad=False)
    embedding.num_embeddings = size
    config: Any = model.config
    config.get_text_config().vocab_size = size
    if hasattr(config, "vocab_size"):
        config.vocab_size = size
    embedding.register_forward_hook(_embed)
    return total


def _start(table_VI: torch.Tensor, ids: Sequence[int]) -> torch.Tensor:
    known = [i for i in ids if i < len(table_VI)]
    mean_I = table_VI.mean(0, dtype=torch.float32)
    start_KI = mean_I.repeat(len(ids), 1)
    for slot, token in enumerate(ids):
        if token in known and (table_VI.is_meta or table_VI[token].any()):
            start_KI[slot] = table_VI[token].float()
    return start_KI


def _embed(module: nn.Module, arguments: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    rows: Any = module.token_rows
    embedded: torch.Tensor = rows.embed(arguments[0], output, getattr(module, "embed_scale", None))
    return embedded


def _layers(model: nn.Module) -> tuple[nn.Embedding, OutputLinear | None]:
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(embedding, nn.Embedding):
        raise InputError(f"adapter.trainable_tokens: {type(embedding).__name__} is no table of embeddings")
    if not isinstance(output, OutputLinear):
        raise InputError(
            f"adapter.trainable_tokens: the output layer is a {type(output).__name__}; only one without an "
            f"adapter, of a model from `load_base`, takes trained rows: leave lm_head out of adapter.targets"
        )
    return embedding, output


def tokens_settings(model: nn.Module) -> dict[str, list[int]]:
    """PEFT's setting: the ids of each layer, by the last component of its name."""
    return {name.rpartition(".")[2]: list(rows.ids) for name, rows in token_rows(model).items()}


def tokens_tensors(model: nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    """The rows under PEFT's names, float32."""
    return {f"{prefix}{name}{SUFFIX}": rows.value() for name, rows in token_rows(model).items()}


def saved_rows(
    model: nn.Module, settings: Mapping[str, Any], others: Mapping[str, torch.Tensor], prefix: str
) -> dict[str, tuple[list[int], torch.Tensor]]:
    """Ids and rows by layer, of a file in PEFT's layout.

    Args:
        others: tensors of the file that belong to no linear layer.
        prefix: of every key.
    Raises: ValueError: setting and tensors do not agree, or this model cannot have such rows.
    """
    layers, setting = vocabulary_layers(model), settings.get(SETTING) or {}
    given = {k.removeprefix(prefix).removesuffix(SUFFIX): t for k, t in others.items() if k.endswith(SUFFIX)}
    if bool(given) != bool(setting):
        raise ValueError(
            f"{SETTING} = {setting!r}, and the file has rows of {', '.join(given) or 'no layer'}"
        )
    if not given:
        return {}
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    output: Any = model.get_output_embeddings()  # type: ignore[operator]
    first = next(name for name, layer in layers.items() if layer is embedding)
    tied = output is None or getattr(output, "weight", None) is embedding.weight
    by_end = setting if isinstance(setting, dict) else {first.rpartition(".")[2]: setting}
    found: dict[str, tuple[list[int], torch.Tensor]] = {}
    for name, rows_KI in given.items():
        ids = next((ids for end, ids in by_end.items() if f".{name}".endswith(f".{end}")), None)
        if name not in layers or ids is None or (tied and name != first):
            raise ValueError(f"{SETTING} = {setting!r}: the file has rows of {name}, allowed: {first}")
        if not all(isinstance(i, int) and i >= 0 for i in ids) or len({*ids}) != len(ids):
            raise ValueError(f"{SETTING} = {setting!r}: expected different token ids")
        if tuple(rows_KI.shape) != (len(ids), embedding.embedding_dim):
            raise ValueError(
                f"{name} has rows of shape {tuple(rows_KI.shape)}, expected "
                f"{(len(ids), embedding.embedding_dim)}"
            )
        found[name] = list(ids), rows_KI
    if first not in found or len({tuple(ids) for ids, _ in found.values()}) > 1:
        raise ValueError(f"{SETTING} = {setting!r}: expected the same tokens in {', '.join(layers)}")
    ids, vocabulary = found[first][0], embedding.weight.shape[0]
    beyond = [i for i in range(vocabulary, max(ids) + 1) if i not in ids]
    if beyond or (max(ids) >= vocabulary and not tied and len(found) == 1):
        raise ValueError(
            f"{SETTING} = {setting!r}: the base has rows of the ids 0 to {vocabulary - 1}, and the file "
            f"lacks some beyond those: save the resized base (resize_token_embeddings, save_pretrained) and "
            f"load the adapter onto that"
        )
    return found


def assign_tokens(
    model: nn.Module, found: Mapping[str, tuple[list[int], torch.Tensor]], storage: torch.dtype
) -> None:
    """Give a loaded model the rows of `saved_rows`.

    Raises: InputError: as `train_tokens`.
    """
    if not found:
        return
    if not token_rows(model):
        train_tokens(model, next(iter(found.values()))[0], storage)
    for name, rows in token_rows(model).items():
        if name in found:
            rows.load(found[name][1])
