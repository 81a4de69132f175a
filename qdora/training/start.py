"""The adapter that a run goes on from: what of the configuration it decides, and what is said about it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qdora.adapters.adapt import Adapted, adapt
from qdora.adapters.saved import SavedAdapter
from qdora.config import RunConfig
from qdora.config_file import check_config
from qdora.distributed.context import DistributedContext
from qdora.errors import InputError
from qdora.models.load import refuse_sharded_base

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def adapt_run(model: PreTrainedModel, config: RunConfig, context: DistributedContext) -> Adapted:
    """Make trainable what a run trains, on the meta device.

    Raises: InputError: as `adapt`, or settings that do not go with those of the adapter to go on from.
    """
    adapted = adapt(model, config.adapter, config.training.mode, seed=config.training.seed)
    if adapted.start is not None:
        refuse_sharded_base(adapted.start, context)
        in_force(config, adapted)
    return adapted


def in_force(config: RunConfig, adapted: Adapted) -> RunConfig:
    """The configuration with the settings of the adapter that the run goes on from.

    Raises: InputError: another section does not go with those.
    """
    if adapted.start is None:
        return config
    tree = config.model_dump(mode="json") | {"adapter": adapted.config.model_dump(mode="json")}
    return check_config(tree, RunConfig, f"adapter.from {config.adapter.from_}")


def refuse_start_in_output(config: RunConfig) -> None:
    """Refuse to go on from an adapter below the folder that this run clears."""
    start = config.adapter.from_
    if start is None:
        return
    try:
        inside = Path(start).resolve().is_relative_to(Path(config.output.dir).resolve())
    except ValueError:  # a null character: refused by name where the path is opened
        return
    if inside:
        raise InputError(
            f"adapter.from {start} is in output.dir {config.output.dir}, which this run would replace; "
            f"choose another output.dir (a run that was interrupted goes on with --resume)"
        )


def say_start(start: SavedAdapter, model: PreTrainedModel, context: DistributedContext) -> None:
    """Say what the run goes on from, and that its base has another name."""
    context.say(f"going on from the adapter in {start.directory}")
    named = start.settings.get("base_model_name_or_path")
    if start.fingerprint is None and named not in (None, model.config.name_or_path):
        context.say(
            f"it names {named!r} as its base, this run has {model.config.name_or_path!r}; the shapes of its "
            f"layers fit, and nothing else is known of that base"
        )
