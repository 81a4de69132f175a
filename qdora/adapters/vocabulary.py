"""The base's embedding and output weights in an adapter's file.

PEFT saves them where an adapter is on the output layer, and where the vocabulary was resized.  Copies of the
base are passed over, others refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

import torch
from torch import nn

from qdora.adapters.base import full_tensor
from qdora.adapters.layer import AdaptedLinear
from qdora.errors import InputError

LEAVES = ("weight", "bias")

CLOSE = 1e-5
"""Relative difference that rounding may leave between the base and a copy of it; trained ones differ more."""


def vocabulary_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The embedding and the output layer, by full name."""
    found: list[nn.Module | None] = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        # A vision model of transformers has the method, and refuses to answer.
        with suppress(AttributeError, NotImplementedError):
            found.append(getattr(model, getter)())
    return {name: module for name, module in model.named_modules() if any(module is one for one in found)}


def vocabulary_copies(model: nn.Module, keys: Iterable[str], prefix: str) -> dict[str, tuple[str, str]]:
    """Those keys that are a weight or bias of the embedding or output layer: that layer's name, and which.

    Args:
        keys: PEFT's.
        prefix: of every key.
    """
    layers = vocabulary_layers(model)
    parts = {key: key.removeprefix(prefix).rpartition(".") for key in keys}
    names = {key: (name.removesuffix(".base_layer"), leaf) for key, (name, _, leaf) in parts.items()}
    return {key: (name, leaf) for key, (name, leaf) in names.items() if leaf in LEAVES and name in layers}


def refuse_other_vocabulary(model: nn.Module, name: str, rows: int, origin: str) -> None:
    """Refuse an adapter of another vocabulary, naming both sizes.

    Args:
        name: of a layer; nothing is refused of one that has no row for each token.
        rows: of its weight in the adapter's file.
    Raises: InputError: the model's layer has other ones.
    """
    layer = vocabulary_layers(model).get(name)
    own = getattr(layer, "num_embeddings", None) or getattr(layer, "out_features", rows)
    if own != rows:
        raise InputError(
            f"{origin}: the adapter was trained with a vocabulary of {rows} tokens (rows of {name}), the "
            f"model's has {own}: save the resized base (resize_token_embeddings, save_pretrained) and load "
            f"the adapter onto that"
        )


@torch.no_grad()
def refuse_changed(model: nn.Module, name: str, leaf: str, saved: torch.Tensor, origin: str) -> None:
    """Refuse an embedding or output layer that was trained; a collective where the model's is sharded.

    Args:
        name: of the layer.
        leaf: `weight` or `bias`.
        saved: that tensor in the adapter's file.
    Raises: InputError: it is not the model's, rounded to the narrower of both dtypes.
    """
    layer = model.get_submodule(name)
    held = layer.base if isinstance(layer, AdaptedLinear) and leaf == "weight" else layer
    own = getattr(held, leaf, None)
    if isinstance(own, torch.Tensor) and own.is_floating_point() and own.shape == saved.shape:
        dtype = min((own.dtype, saved.dtype), key=lambda dtype: dtype.itemsize)
        present, given = (full_tensor(tensor, dtype).cpu().double() for tensor in (own, saved))
        if (given - present).norm() <= CLOSE * present.norm():
            return
    raise InputError(
        f"{origin}: the file has a {leaf} of {name} that is not the base's; only low-rank updates and "
        f"magnitudes are read: save the base that has it, and load the adapter onto that"
    )
