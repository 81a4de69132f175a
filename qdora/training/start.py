"""What a run starts from: settings that its ranks can follow, an adapter to go on from, its tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from qdora.adapters.adapt import Adapted, adapt
from qdora.adapters.peft_io import save_adapter
from qdora.adapters.saved import SavedAdapter
from qdora.adapters.tokens import add_special_tokens
from qdora.config import RunConfig
from qdora.config_file import check_config
from qdora.data.chat_templates import TEMPLATE_FILE, use_chat_template
from qdora.data.vocabulary import embedding_rows
from qdora.distributed.context import DistributedContext
from qdora.errors import InputError
from qdora.models.formats import Checkpoint
from qdora.models.load import refuse_sharded_base, required_tokenizer, save_beside_adapter
from qdora.training.layers import check_layer_settings
from qdora.training.loop import micro_batch_size
from qdora.training.optimizers import check_optimizer
from qdora.training.schedule import check_schedule

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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


def save_adapter_and_tokenizer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path | None
) -> None:
    """Write the adapter, and beside it a tokenizer with tokens or a chat template of its own.

    Args:
        tokenizer: None where it is the base's.
        folder: None on the other ranks.
    """
    if folder is not None and tokenizer is not None:
        save_beside_adapter(folder, tokenizer)
    save_adapter(model, folder)  # last: with its weights it counts as complete


def run_tokenizer(
    checkpoint: Checkpoint, config: RunConfig, say: Callable[[str], None] = lambda text: None
) -> PreTrainedTokenizerBase:
    """The tokenizer that a run trains with: that of the adapter it goes on from where there is one, with the
    tokens of `adapter.trainable_tokens` and the template that `data.chat_template` names.

    Args:
        say: told what a chat template changes.
    Raises: InputError: as `required_tokenizer` and `use_chat_template`.
    """
    tokenizer = required_tokenizer(checkpoint, adapter=_start_folder(config))
    trained_ids(tokenizer, checkpoint, config)
    if config.data.chat_template is not None:
        say(use_chat_template(tokenizer, config.data.chat_template))
    return tokenizer


def starts_with_template(config: RunConfig) -> bool:
    """Whether the adapter that a run goes on from has a chat template beside it."""
    folder = _start_folder(config)
    return folder is not None and (folder / TEMPLATE_FILE).is_file()


def _start_folder(config: RunConfig) -> Path | None:
    return None if config.adapter.from_ is None else Path(config.adapter.from_)


def trained_ids(tokenizer: PreTrainedTokenizerBase, checkpoint: Checkpoint, config: RunConfig) -> list[int]:
    """Ids of `adapter.trainable_tokens`, which are added to the tokenizer where it lacks them."""
    return add_special_tokens(
        tokenizer, config.adapter.trainable_tokens or (), embedding_rows(checkpoint.config)
    )


def table_rows(tokenizer: PreTrainedTokenizerBase, checkpoint: Checkpoint, config: RunConfig) -> int:
    """Rows of the embedding, with those for the tokens that are added."""
    ids = trained_ids(tokenizer, checkpoint, config)
    return max([embedding_rows(checkpoint.config), *(i + 1 for i in ids)])
