"""The base model that a configuration names, whole or sharded over the processes of a launch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qdora.adapters.peft_format import check_base, fill_saved, inject_saved, load_adapter
from qdora.adapters.peft_layout import read_saved
from qdora.config import ModelConfig
from qdora.distributed.context import DistributedContext
from qdora.distributed.fsdp import shard_model, start_sharded
from qdora.distributed.shard_peers import ShardPeers
from qdora.errors import InputError
from qdora.models.load import fill, load_base, open_skeleton

T = TypeVar("T")


def load_configured(
    settings: ModelConfig, *, device: str | torch.device = "auto", progress: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """`load_base` with every setting of the `model` section.

    Raises: InputError: as `load_base`, or the model comes without a tokenizer.
    """
    model, tokenizer = load_base(
        settings.path,
        base=settings.base,
        dtype=settings.dtype,
        device=device,
        revision=settings.revision,
        block_size=settings.block_size,
        double_quantization=settings.double_quantization,
        progress=progress,
    )
    return model, _present(tokenizer, settings)


def load_adapted(
    settings: ModelConfig, prepare: Callable[[PreTrainedModel], T], context: DistributedContext
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, T]:
    """The configured model with adapters, sharded where the launch asks for FSDP.

    Sharded, it gets its adapters and is divided before it has a weight; then each process reads its rows.

    Args:
        prepare: gives the model its adapters: `inject` or `inject_saved` with their settings.
    Returns: the model, its tokenizer, what `prepare` returned.
    Raises: InputError: as `load_base` and `prepare`; on every process where it happened to one.
    """
    if context.fsdp is None:
        model, tokenizer = load_configured(settings, device=context.device, progress=context.is_main)
        return model, tokenizer, prepare(model)
    assert context.mesh is not None
    with context.raise_on_all_ranks():
        skeleton = open_skeleton(
            settings.path,
            base=settings.base,
            dtype=settings.dtype,
            device=context.device,
            revision=settings.revision,
            block_size=settings.block_size,
            double_quantization=settings.double_quantization,
        )
        tokenizer = _present(skeleton.checkpoint.tokenizer(), settings)
        report = prepare(skeleton.model)
        shard_model(skeleton.model, context.mesh, context.fsdp)
    peers = ShardPeers(context)
    model = fill(skeleton, context.device, peers=peers, progress=context.is_main)
    start_sharded(model, context.device, peers.storage)
    return model, tokenizer, report


def load_with_adapter(
    settings: ModelConfig, adapter: Path | None, context: DistributedContext
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The configured model with a saved adapter on it, sharded where the launch asks for FSDP.

    Args:
        adapter: folder in PEFT's format; None leaves the base alone.
    Raises: InputError: anything that cannot be loaded or does not fit.
    """
    if adapter is None or context.fsdp is None:
        model, tokenizer, _ = load_adapted(settings, lambda model: None, context)
        with context.raise_on_all_ranks():
            if adapter is not None:
                load_adapter(model, adapter)
        return model, tokenizer
    with context.raise_on_all_ranks():
        saved = read_saved(adapter)
    model, tokenizer, _ = load_adapted(settings, lambda model: inject_saved(model, saved), context)
    check_base(model, saved)
    fill_saved(model, saved)
    return model, tokenizer


def _present(tokenizer: PreTrainedTokenizerBase | None, settings: ModelConfig) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise InputError(f"{settings.path}: the model comes without a tokenizer")
    return tokenizer
