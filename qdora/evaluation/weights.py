"""Merged weights for the time of an evaluation: each layer multiplies one dense matrix, where memory allows.

A layer that stays as it is dequantizes its weight for every token that is generated.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from qdora.adapters.full import compute_dtype_of
from qdora.adapters.layer import AdaptedLinear, OutputLinear
from qdora.config import EvaluationWeights
from qdora.distributed.context import DistributedContext
from qdora.distributed.fsdp import MARGIN, cache_bytes, free_memory, sharded_modules
from qdora.errors import InputError


def mergeable(model: PreTrainedModel) -> list[AdaptedLinear]:
    """Layers that a dense copy in the compute dtype makes faster."""
    dtype = compute_dtype_of(model)
    layers = [module for module in model.modules() if isinstance(module, AdaptedLinear)]
    return [
        layer for layer in layers if layer.enabled and not layer.is_merged and not _is_plain(layer, dtype)
    ]


def _is_plain(layer: AdaptedLinear, dtype: torch.dtype) -> bool:
    """Whether a layer multiplies one dense weight of this dtype anyway."""
    return not layer.has_adapter and next(layer.base.parameters()).dtype == dtype


def _loses_small_updates(layers: list[AdaptedLinear], dtype: torch.dtype) -> bool:
    """Whether merged copies lose what an adapter has learned: the sum with a weight that stands on the grid
    of 16 bits rounds back to it; a quantized weight stands between."""
    return dtype.itemsize < 4 and any(layer.base.quantization == "none" for layer in layers)


def _narrow_output(model: PreTrainedModel, dtype: torch.dtype) -> OutputLinear | None:
    """The output layer, where its weight is widened for every token otherwise."""
    output = model.get_output_embeddings()
    return output if isinstance(output, OutputLinear) and output.weight.dtype != dtype else None


@contextmanager
def evaluation_weights(
    model: PreTrainedModel, context: DistributedContext, wanted: EvaluationWeights, tokens: int
) -> Iterator[EvaluationWeights]:
    """Compute with merged weights in the block, where asked to, or by itself where the memory is there.

    Args:
        wanted: `auto`: merged where free memory has room for the copies beside the key-value cache, and
            rounding them loses nothing; else as they are.
        tokens: prompts and answers that are in memory at one time, for the cache.
    Yields: `merged` or `adapted`, the same on all ranks.
    Raises: InputError: `merged`, and the model is sharded.
    """
    if sharded_modules(model):
        if wanted == "merged":
            raise InputError("evaluation.weights 'merged': no rank has the full weights of a sharded model")
        yield "adapted"
        return
    layers, dtype = mergeable(model), compute_dtype_of(model)
    output = _narrow_output(model, dtype)
    sizes = [layer.base.logical_parameters for layer in layers]
    sizes += [] if output is None else [output.weight.numel()]
    needed = sum(sizes) * dtype.itemsize
    merges = wanted == "merged"
    if wanted == "auto" and sizes:
        free = free_memory(context.device)
        loses = _loses_small_updates(layers, dtype)
        # One answer for all ranks: their results are one score.
        merges = all(context.gather([not loses and needed + tokens * cache_bytes(model) <= MARGIN * free]))
        if not merges:
            room = f"merged copies take {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free"
            rounds = f"merged copies in {str(dtype).removeprefix('torch.')} could lose small updates"
            context.say(
                f"evaluating weights and adapters apart, which is slower: {rounds if loses else room}"
            )
    try:
        if not merges:
            for layer in layers:
                layer.fold()
            yield "adapted" if layers else "merged"
            return
        for layer in layers:
            layer.merge(dtype)
        if output is not None:
            output.widen(dtype)
        yield "merged"
    finally:
        if output is not None:
            output.narrow()
        for layer in layers:
            layer.unmerge()
            layer.unfold()
