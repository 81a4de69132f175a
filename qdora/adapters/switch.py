"""A model with its adapter merged, unmerged, or left out for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from qdora.adapters.inject import adapted_layers


def merge_adapters(model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Compute every adapted layer with one dense weight until `unmerge_adapters`.

    The output differs by the rounding of the merged weight alone: relative 1e-5 for float32, 2e-3
    for float16 and 2e-2 for bfloat16, the bounds that the tests hold.  The stored weights stay as they are.

    Args:
        dtype: of the merged copies, which need memory beside the stored weights.
    """
    for layer in adapted_layers(model).values():
        layer.merge(dtype)


def unmerge_adapters(model: nn.Module) -> None:
    """Compute with stored weight and adapter again: bit for bit what was there before the merge."""
    for layer in adapted_layers(model).values():
        layer.unmerge()


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The base model for a while, for example as a reference or as the baseline of an evaluation."""
    layers = [layer for layer in adapted_layers(model).values() if layer.enabled]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True
