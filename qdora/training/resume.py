"""A run that goes on from a checkpoint: the optimizer's state, and the best adapter of that time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qdora.config import RunConfig
from qdora.errors import InputError
from qdora.files import remove
from qdora.run import RunDirectory
from qdora.training.best import copy_best
from qdora.training.checkpoint import BEST, SavedState, list_checkpoints, load_checkpoint, newest_usable
from qdora.training.loop import Trainer


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
