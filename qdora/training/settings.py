"""What the training settings ask of a launch, and what a resumed run must agree on with its checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qdora.config import RunConfig
from qdora.config_file import dotted
from qdora.data.batches import Packing
from qdora.distributed.context import DistributedContext
from qdora.errors import InputError
from qdora.tasks.prepare import PreparedData
from qdora.training.layers import check_layer_settings
from qdora.training.loop import micro_batch_size
from qdora.training.optimizers import check_optimizer
from qdora.training.schedule import check_schedule

# What may differ between a run and its continuation.  A longer run decays its rate more slowly from
# where it goes on; what was done stays as it was.
_FREE_TO_CHANGE = (
    "training.max_steps",
    "training.epochs",
    "training.save_every",
    "training.keep_checkpoints",
    "training.async_checkpoints",
    "training.patience",
    # How the same step is computed: other processes or another GPU may need it otherwise.
    "training.gradient_accumulation",
    "training.gradient_checkpointing",
    "training.checkpoint_every",
    "training.offload_activations",
    "training.compile",
)


# They came after the first checkpoints; what had no key then was this.
_LATER = {
    "adapter.b_rate_ratio": 1.0,
    "adapter.magnitude_rate_ratio": 1.0,
    "training.optimizer": "adamw",
}


def check_settings(config: RunConfig, context: DistributedContext) -> None:
    """Refuse what these ranks cannot do, before a weight is read.

    Raises: InputError: the key, what came and what is allowed.
    """
    training = config.training
    micro_batch_size(training, context.world_size)
    check_layer_settings(training, context.device)
    check_optimizer(training, context.device, sharded=context.fsdp is not None)
    check_schedule(training)
    if context.fsdp is not None and config.adapter.trainable_tokens is not None:
        raise InputError("adapter.trainable_tokens does not go with FSDP, which divides the tables' rows")


def agreed_settings(
    config: RunConfig, data: PreparedData, base: str | None, start: str | None = None
) -> dict[str, Any]:
    """The settings that a checkpoint records.

    Args:
        base: fingerprint of the base model.
        start: digest of the adapter that the run goes on from.
    """
    flat = plain_values(config.model_dump(mode="json", include={"model", "adapter", "training"}))
    return {
        **{
            k: v for k, v in flat.items() if k not in _FREE_TO_CHANGE and not (k in _LATER and v == _LATER[k])
        },
        "data.train": data.fingerprints["train"],
        "data.prompt": config.data.prompt,
        # None where it is what runs have always done.
        "data.loss_on": None if config.data.loss_on == "assistant" else config.data.loss_on,
        "data.chat_template": config.data.chat_template,
        # Joining a step's sequences changes its rounding only; filling rows changes which they are.
        "data.max_length of filled rows (data.packing: stream)": Packing.of(
            config.data.packing, config.data.max_length
        ).row_tokens,
        # Where no text holds a special token it decides nothing.
        "data.parse_special_tokens": config.data.parse_special_tokens if data.special_text else None,
        "base": base,
        # What it holds, wherever it is: of a magnitude the frozen part is read from it again.
        "adapter.from": start,
    }


def plain_values(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted key, as trackers take them."""
    return {k: ", ".join(map(str, v)) if isinstance(v, list) else v for k, v in dotted(tree).items()}
