"""A run that goes on from a checkpoint: settings that both share, the optimizer's state, the best adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qdora.config import RunConfig
from qdora.config_file import dotted
from qdora.data.batches import Packing
from qdora.errors import InputError
from qdora.files import remove
from qdora.run import RunDirectory
from qdora.tasks.prepare import PreparedData
from qdora.training.best import copy_best
from qdora.training.checkpoint import BEST, SavedState, list_checkpoints, load_checkpoint, newest_usable
from qdora.training.loop import Trainer

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


def restore(
    trainer: Trainer, directory: RunDirectory, resume: str | None, settings: Mapping[str, Any]
) -> SavedState | None:
    """Load the optimizer's state from a checkpoint; what else it has. None: from the beginning."""
    if resume is None:
        return None
    context, state = trainer.context, trainer.optimizer.state()
    if resume == "auto":
        found = newest_usable(directory.checkpoints, state, settings, context, context.say)
    else:
        found = load_checkpoint(Path(resume), state, settings, context)
    if found is None:
        left = context.gather([[path.name for path in list_checkpoints(directory.checkpoints)]])[0]
        if left:  # a first save would remove them, and the disk may only be away for the moment
            raise InputError(
                f"{directory.checkpoints}: none of its checkpoints ({', '.join(left)}) can be used; look at "
                f"them, or start anew without --resume and with --set output.overwrite=true"
            )
        context.say(f"{directory.path}: no checkpoint; starting from the beginning")
        return None
    trainer.optimizer.load_state(found.tensors)
    writers = f"{found.world_size} process{'es' if found.world_size > 1 else ''}"
    context.say(f"resuming after step {found.step}, written by {writers}")
    return replace(found, tensors={})


def restore_best(directory: RunDirectory, found: SavedState | None, config: RunConfig) -> None:
    """Bring the best adapter, and what the manifest says of it, to where the run goes on from."""
    measure = config.training.keep_best
    if found is None or measure is None:
        remove(directory.best_adapter)
        return
    copy_best(found.folder / BEST, directory.best_adapter)
    directory.record(best=found.validation.best(measure))
