"""`train`: from a configuration to a run directory with a trained adapter."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tabulate import tabulate

from qdora.adapters.adapt import Adapted, adapt, with_tokens
from qdora.adapters.base import describe
from qdora.adapters.gated import GATES
from qdora.adapters.inject import InjectionReport
from qdora.adapters.peft_io import check_savable, save_adapter
from qdora.adapters.saved import CONFIG_FILE, SavedAdapter
from qdora.adapters.tokens import add_special_tokens
from qdora.config import RunConfig
from qdora.config_file import check_config, config_digest
from qdora.data.rows import Example
from qdora.data.vocabulary import check_ids, check_questions, embedding_rows, fit_padding
from qdora.distributed.context import DistributedContext
from qdora.errors import InputError
from qdora.evaluation.scores import write_scores
from qdora.files import fsync, read_json, wrap_os_errors
from qdora.models.build import build_model
from qdora.models.formats import Checkpoint
from qdora.models.load import (
    build_adapted,
    load_model,
    put_saved,
    refuse_sharded_base,
    required_tokenizer,
)
from qdora.models.sources import open_checkpoint
from qdora.quant import Quantization
from qdora.run import RunDirectory, package_versions
from qdora.tasks import check_run
from qdora.tasks.prepare import PreparedData, prepare
from qdora.tasks.shots import draw_shots
from qdora.training.attention import check_packing
from qdora.training.checkpoint import CheckpointWriter, list_checkpoints, load_checkpoint, newest_usable
from qdora.training.identity import flat_values, input_digests, packing_of, resume_settings, run_manifest
from qdora.training.layers import check_layer_settings
from qdora.training.loop import Callbacks, Trainer, micro_batch_size
from qdora.training.loss import check_output_layer
from qdora.training.metrics import (
    StepMetrics,
    TrainingBar,
    append_metrics,
    keep_until,
    read_metrics,
    reset_peak_memory,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def train(
    config: RunConfig, resume: str | None = None, context: DistributedContext | None = None
) -> RunDirectory:
    """Train as configured; nothing is written before everything has been checked.

    Args:
        config: of the run.
        resume: None for a new run, `auto`, or a checkpoint folder.
        context: of the launch, when several runs share it.
    Raises: InputError: anything that the configuration or its files get wrong.
        InterruptedRunError: stopped on request, after a checkpoint.
    """
    check_run(config)
    _refuse_start_in_output(config)
    context = context or DistributedContext.from_launch(config.training.trackers, config.output.dir)
    directory = RunDirectory(config.output.dir)
    context.refuse_disagreement({"the configuration": config_digest(config), **package_versions()})
    with context.raise_on_all_ranks():
        micro_batch_size(config.training, context.world_size)
        check_layer_settings(config.training, context.device)
        if context.fsdp is not None and config.adapter.trainable_tokens is not None:
            raise InputError("adapter.trainable_tokens does not go with FSDP, which divides the tables' rows")
    with context.on_main_rank(directory.locked):
        _train_locked(config, resume, context, directory)
        context.barrier()
    return directory


def _train_locked(
    config: RunConfig, resume: str | None, context: DistributedContext, directory: RunDirectory
) -> None:
    with context.raise_on_all_ranks():
        if resume is None:
            directory.refuse_if_used(config.output.overwrite)
    reset_peak_memory(context.device)
    with context.raise_on_all_ranks():
        # Data first: a model is not quantized only to find a missing column.
        checkpoint, tokenizer, data = read_inputs(config)
        shots = draw_shots(config, tokenizer, data.test) if config.evaluation.every else {}
    _say_data(data, config, context)
    model, adapted = load_model(
        checkpoint, config.model, context, lambda model: _adapt(model, config, context)
    )
    report, base, config = adapted.report, adapted.start, _in_force(config, adapted)
    context.refuse_disagreement(input_digests(model, data, base))
    if base is not None:
        put_saved(model, base, context)
        _say_start(base, model, context)
    with context.raise_on_all_ranks():
        report = with_tokens(model, report, config.adapter, _trained_ids(tokenizer, checkpoint, config))
        adapted = dataclasses.replace(adapted, report=report)
    check_savable(model)
    context.say(str(report))
    trainer = Trainer(
        model,
        data.train,
        config.training,
        context,
        data.pad_id,
        evaluate_every=config.evaluation.every,
        packing=packing_of(config),
    )
    context.say(str(trainer.batch_sizes()))
    settings = resume_settings(config, model, data, base)
    start = _restore(trainer, directory, resume, settings)
    manifest = run_manifest(config, model, data, adapted, context)
    with context.raise_on_all_ranks():
        if context.is_main:
            directory.clear_leftovers()
            if resume is None:
                directory.clear()
            if start == 0:
                directory.start(config, manifest)
            else:
                directory.record_resume(config, start)
            missing = keep_until(directory.metrics_file, start)
            if missing:
                context.say(f"{directory.metrics_file}: it lacks {missing} of the {start} steps done")
    del adapted, base  # with the tensors that were read
    _train(trainer, directory, config, settings, start, tokenizer, data, shots)
    steps: list[StepMetrics] = []
    with context.raise_on_all_ranks():
        if context.is_main:
            from qdora.experiments.plots import plot_loss  # with matplotlib

            steps = read_metrics(directory.metrics_file)
            trained = describe(config.model.quantization, config.adapter, config.training.mode)
            plot_loss({trained: steps}, directory.loss_plot, f"Training loss, {directory.path.name}")
    # Last, since a run that has its adapter counts as finished.
    _save(model, tokenizer, config, directory.adapter if context.is_main else None)
    if context.is_main:
        print(_summary(directory, report, steps))


def read_inputs(config: RunConfig) -> tuple[Checkpoint, PreTrainedTokenizerBase, PreparedData]:
    """Open the base model and tokenize the data; no weight is read.

    Raises: InputError: the model, its tokenizer or the data are missing or cannot be used.
    """
    check_run(config)
    checkpoint = open_checkpoint(config.model.path, config.model.revision)
    tokenizer = required_tokenizer(checkpoint)
    context_length = getattr(checkpoint.config, "max_position_embeddings", None)
    ids = _trained_ids(tokenizer, checkpoint, config)
    rows = max([embedding_rows(checkpoint.config), *(i + 1 for i in ids)])
    data = prepare(config.data, tokenizer, context_length)
    padding = fit_padding(tokenizer, rows)
    if padding is not None and os.environ.get("RANK", "0") == "0":
        print(padding, file=sys.stderr)
    check_ids(tokenizer, rows, ((example.origin, example.input_ids) for example in data.train))
    check_questions(tokenizer, rows, config.data, [*data.validation, *data.test[: config.evaluation.limit]])
    return checkpoint, tokenizer, dataclasses.replace(data, pad_id=tokenizer.pad_token_id)


def planned_manifest(config: RunConfig, data: PreparedData, context: DistributedContext) -> dict[str, Any]:
    """Check everything about a run that needs no weight, its model on the meta device; a collective.

    Args:
        data: of `read_inputs`.
    Returns: the manifest that the run would write, but None for the base's fingerprint.
    Raises: InputError: an adapter or format does not fit the model, or the batch not the number of ranks.
    """
    with context.raise_on_all_ranks():
        micro_batch_size(config.training, context.world_size)
        check_layer_settings(config.training, context.device)
        checkpoint = open_checkpoint(config.model.path, config.model.revision)
    meta, adapted = build_adapted(
        checkpoint, config.model, context, lambda model: _adapt(model, config, context)
    )
    config = _in_force(config, adapted)
    with context.raise_on_all_ranks():
        if config.adapter.trainable_tokens is not None:
            ids = _trained_ids(required_tokenizer(checkpoint), checkpoint, config)
            report = with_tokens(meta.model, adapted.report, config.adapter, ids)
            adapted = dataclasses.replace(adapted, report=report)
        check_savable(meta.model)
        check_output_layer(meta.model)
        if packing_of(config).joined:
            check_packing(meta.model.config)
        if config.evaluation.quantization is not None:
            # Whether that format holds every layer must not be found out after the training.
            checkpoint = open_checkpoint(config.model.path, config.model.revision)
            build_model(checkpoint, torch.float32, Quantization(config.evaluation.quantization))
        return run_manifest(config, meta.model, data, adapted, context)


def _train(
    trainer: Trainer,
    directory: RunDirectory,
    config: RunConfig,
    settings: Mapping[str, Any],
    start: int,
    tokenizer: PreTrainedTokenizerBase,
    data: PreparedData,
    shots: Mapping[str, Sequence[Example]],
) -> None:
    context = trainer.context
    if config.training.trackers:
        context.start_trackers(flat_values(config.model_dump(mode="json")))
    checkpoints = CheckpointWriter(
        directory.checkpoints,
        settings,
        context,
        keep=config.training.keep_checkpoints,
        full_tensors=context.fsdp is not None and context.fsdp.state_dict_type == "full",
        in_background=config.training.async_checkpoints,
    )
    with TrainingBar(trainer.total_steps, start, shown=context.is_main) as bar, checkpoints:

        def log(metrics: StepMetrics) -> None:
            append_metrics(directory.metrics_file, metrics)
            bar.show(metrics)
            context.track(dataclasses.asdict(metrics), step=metrics.step)

        def save(step: int) -> None:
            with context.raise_on_all_ranks(), wrap_os_errors(directory.metrics_file):
                if context.is_main:
                    fsync(directory.metrics_file)  # a checkpoint must not outlive the steps before it
            epoch, batch = divmod(step, trainer.plan.steps_per_epoch)
            position = {"seed": config.training.seed, "epoch": epoch, "batch": batch}
            checkpoints.save(
                step,
                trainer.optimizer.state(),
                position,
                lambda folder: _save(trainer.model, tokenizer, config, folder),
            )

        def evaluate(step: int) -> None:
            from qdora.evaluation.evaluate import evaluate_configured  # with transformers' generation

            scores = evaluate_configured(
                trainer.model, tokenizer, data.test, config, context, shots=shots, show_progress=False
            )
            if context.is_main:
                for score in scores:
                    write_scores(score, directory.evaluation / f"step-{step}")
                    bar.say(f"step {step}: {score}")
                    context.track({f"{score.task}/{score.metric}": score.score}, step=step)

        trainer.run(start, Callbacks(log=log, save=save, evaluate=evaluate))
    if config.training.trackers:
        context.end()


def _save(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: RunConfig, folder: Path | None
) -> None:
    """The adapter, and beside it a tokenizer that has tokens of its own."""
    if folder is not None and config.adapter.trainable_tokens is not None:
        with wrap_os_errors(folder):
            tokenizer.save_pretrained(folder)
    save_adapter(model, folder)  # last: with its weights it counts as complete


def _trained_ids(tokenizer: PreTrainedTokenizerBase, checkpoint: Checkpoint, config: RunConfig) -> list[int]:
    """Ids of `adapter.trainable_tokens`, which are added to the tokenizer where it lacks them."""
    return add_special_tokens(
        tokenizer, config.adapter.trainable_tokens or (), embedding_rows(checkpoint.config)
    )


def _restore(
    trainer: Trainer, directory: RunDirectory, resume: str | None, settings: Mapping[str, Any]
) -> int:
    """Load the optimizer's state from a checkpoint; the steps already done."""
    if resume is None:
        return 0
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
        return 0
    trainer.optimizer.load_state(found.tensors)
    writers = f"{found.world_size} process{'es' if found.world_size > 1 else ''}"
    context.say(f"resuming after step {found.step}, written by {writers}")
    return found.step


def _adapt(model: PreTrainedModel, config: RunConfig, context: DistributedContext) -> Adapted:
    adapted = adapt(model, config.adapter, config.training.mode, seed=config.training.seed)
    if adapted.start is not None:
        refuse_sharded_base(adapted.start, context)
        _in_force(config, adapted)
    return adapted


def _in_force(config: RunConfig, adapted: Adapted) -> RunConfig:
    """The configuration with the settings of the adapter that the run goes on from.

    Raises: InputError: another section does not go with those.
    """
    if adapted.start is None:
        return config
    tree = config.model_dump(mode="json") | {"adapter": adapted.config.model_dump(mode="json")}
    return check_config(tree, RunConfig, f"adapter.from {config.adapter.from_}")


def _refuse_start_in_output(config: RunConfig) -> None:
    """Refuse to go on from an adapter below the folder that this run clears."""
    start, output = config.adapter.from_, Path(config.output.dir).resolve()
    if start is not None and Path(start).resolve().is_relative_to(output):
        raise InputError(
            f"adapter.from {start} is in output.dir {config.output.dir}, which this run would replace; "
            f"choose another output.dir (a run that was interrupted goes on with --resume)"
        )


def _say_start(start: SavedAdapter, model: PreTrainedModel, context: DistributedContext) -> None:
    context.say(f"going on from the adapter in {start.directory}")
    named = start.settings.get("base_model_name_or_path")
    if start.fingerprint is None and named not in (None, model.config.name_or_path):
        context.say(
            f"it names {named!r} as its base, this run has {model.config.name_or_path!r}; the shapes of its "
            f"layers fit, and nothing else is known of that base"
        )


def _summary(directory: RunDirectory, report: InjectionReport, steps: list[StepMetrics]) -> str:
    seconds = sum(m.seconds for m in steps)
    rows = [
        ("steps", len(steps)),
        ("final loss", f"{steps[-1].loss:.4f}" if steps else "none"),
        ("trainable parameters", f"{report.trainable:,} ({report.percentage:.2f}%)"),
        ("tokens/s", f"{sum(m.tokens for m in steps) / seconds:,.0f}" if seconds else "none"),
        ("peak memory", f"{max((m.peak_memory_bytes for m in steps), default=0) / 2**30:.2f} GiB"),
        ("adapter", directory.adapter),
        ("loss plot", directory.loss_plot),
    ]
    gates = list(read_json(directory.adapter / CONFIG_FILE).get(GATES, {}).values())
    if gates:
        spread = f"{min(gates):.4f} to {max(gates):.4f}, mean {sum(gates) / len(gates):.4f}"
        rows.append(("gates", f"{spread}; each layer's in adapter/{CONFIG_FILE}"))
    return tabulate(rows, tablefmt="plain")


def _say_data(data: PreparedData, config: RunConfig, context: DistributedContext) -> None:
    context.say(
        f"{len(data.train)} training examples, {len(data.test)} test examples; "
        f"{data.leaked} training examples removed because their question is a test question"
    )
    if data.validation:
        context.say(
            f"{len(data.validation)} validation examples left out of training; "
            f"{data.leaked_validation} training examples removed because their question is one of theirs"
        )
    for row in data.skipped[:5]:
        context.say(f"skipped {row}")
    if len(data.skipped) > 5:
        context.say(f"... {len(data.skipped)} rows skipped in all")
    if data.special_text:
        parsed = "that token" if config.data.parse_special_tokens else "ordinary text"
        context.say(
            f"examples with the text of a special token: {len(data.special_text)}, the first "
            f"{data.special_text[0]}; it is read as {parsed} (data.parse_special_tokens)"
        )
