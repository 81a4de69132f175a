"""What a resumed run must agree on with the one that wrote its checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qdora.config import RunConfig
from qdora.config_file import dotted
from qdora.data.batches import Packing
from qdora.tasks.prepare import PreparedData

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
        **{key: value for key, value in flat.items() if key not in _FREE_TO_CHANGE},
        "data.train": data.fingerprints["train"],
        "data.prompt": config.data.prompt,
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
