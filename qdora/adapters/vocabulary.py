"""The base's embedding and output weights in an adapter's file.

PEFT saves them where an adapter is on the output layer, and where the vocabulary was resized.  Copies of the
base are passed over, others refused.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from qdora.adapters.base import full_tensor
from qdora.adapters.layer import AdaptedLinear
from qdora.errors import InputError

LEAST = 2.0**-24
"""Smallest positive float16: what a bfloat16 value may lose in it."""


def vocabulary_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The embedding and the output layer, by full name."""
    getters = ("get_input_embeddings", "get_output_embeddings")
    found = [getattr(model, getter)() for getter in getters if hasattr(model, getter)]
    return {name: module for name, module in model.named_modules() if any(module is one for one in found)}


def vocabulary_copies(model: nn.Module, keys: Iterable[str], prefix: str) -> dict[str, str]:
    """Those keys that are the weight of the embedding or of the output layer, with the name of that layer.

    Args:
        keys: PEFT's.
        prefix: of every key.
    """
    layers = vocabulary_layers(model)
    names = {
        key: key.removeprefix(prefix).removesuffix(".weight").removesuffix(".base_layer") for key in keys
    }
    return {key: name for key, name in names.items() if key.endswith(".weight") and name in layers}


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
def refuse_changed(model: nn.Module, name: str, saved_OI: torch.Tensor, origin: str) -> None:
    """Refuse an embedding or output weight that was trained; a collective where the model's is sharded.

    Args:
        name: of the layer.
        saved_OI: its weight in the adapter's file.
    Raises: InputError: it is not the model's, rounded to the narrower of both dtypes.
    """
    layer = model.get_submodule(name)
    weight = getattr(layer.base if isinstance(layer, AdaptedLinear) else layer, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.is_floating_point():
        own_OI = full_tensor(weight, weight.dtype)
        dtype = min((own_OI.dtype, saved_OI.dtype), key=lambda dtype: dtype.itemsize)
        own, given = (tensor.to("cpu", dtype).float() for tensor in (own_OI, saved_OI))
        if torch.allclose(own, given, rtol=0, atol=LEAST):
            return
    raise InputError(
        f"{origin}: the file has a weight of {name} that is not the base's; only low-rank updates and "
        f"magnitudes are read: save the base that has it, and load the adapter onto that"
    )
