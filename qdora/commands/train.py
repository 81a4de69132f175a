"""`train`: from a configuration to a run directory with a trained adapter."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from tabulate import tabulate

from qdora.adapters.base import describe
from qdora.adapters.fingerprint import base_fingerprint
from qdora.adapters.full import adapt
from qdora.adapters.gated import GATES
from qdora.adapters.inject import InjectionReport, initial_update_fingerprint
from qdora.adapters.peft_io import CONFIG_FILE, check_savable, save_adapter
from qdora.config import RunConfig
from qdora.config_file import config_digest, dotted
from qdora.data.batches import BatchPlan, Packing
from qdora.data.rows import Example
from qdora.data.vocabulary import check_ids, check_questions, embedding_rows, fit_padding
from qdora.distributed.context import DistributedContext
from qdora.errors import InputError
from qdora.evaluation.scores import write_scores
from qdora.files import fsync, read_json, wrap_os_errors
from qdora.models.build import build_model
from qdora.models.formats import Checkpoint
from qdora.models.load import build_adapted, compute_dtype, load_model, required_tokenizer
from qdora.models.sources import open_checkpoint
from qdora.planner.check import refuse_what_cannot_fit
from qdora.quant import Quantization
from qdora.run import RunDirectory, make_manifest, package_versions
from qdora.tasks import check_run
from qdora.tasks.prepare import PreparedData, prepare
from qdora.tasks.shots import draw_shots
from qdora.training.attention import check_packing
from qdora.training.checkpoint import CheckpointWriter, list_checkpoints, load_checkpoint, newest_usable
from qdora.training.layers import check_layer_settings
from qdora.training.loop import Callbacks, Trainer, count_steps, micro_batch_size
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

Observer: TypeAlias = "Callable[[PreTrainedModel, PreTrainedTokenizerBase, PreparedData], None]"
"""Looks at a run's model, tokenizer and data."""

# What may differ between a run and its continuation.  A longer run decays its rate more slowly from
# where it goes on; what was done stays as it was.
_FREE_TO_CHANGE = (
    "training.max_steps",
    "training.epochs",
    "training.save_every",
    "training.keep_checkpoints",
    "training.async_checkpoints",
    # How the same step is computed: other processes or another GPU may need it otherwise.
    "training.gradient_accumulation",
    "training.gradient_checkpointing",
    "training.checkpoint_every",
    "training.offload_activations",
    "training.compile",
)


def train(
    config: RunConfig,
    resume: str | None = None,
    context: DistributedContext | None = None,
    *,
    check_memory: bool = True,
    before: Observer | None = None,
    after: Observer | None = None,
) -> RunDirectory:
    """Train as configured; nothing is written before everything has been checked.

    Args:
        config: of the run.
        resume: None for a new run, `auto`, or a checkpoint folder.
        context: of the launch, when several runs share it.
        check_memory: refuse a run whose worst batch does not fit by the planner's estimate.
        before, after: get the loaded model before the first step and after the last; on all ranks.
    Raises: InputError: anything that the configuration or its files get wrong.
        InterruptedRunError: stopped on request, after a checkpoint.
    """
    check_run(config)
    context = context or DistributedContext.from_launch(config.training.trackers, config.output.dir)
    directory = RunDirectory(config.output.dir)
    context.refuse_disagreement({"the configuration": config_digest(config), **package_versions()})
    with context.raise_on_all_ranks():
        micro_batch_size(config.training, context.world_size)
        check_layer_settings(config.training, context.device)
    with context.on_main_rank(directory.locked):
        _train_locked(config, resume, context, directory, check_memory, before, after)
        context.barrier()
    return directory


def _train_locked(
    config: RunConfig,
    resume: str | None,
    context: DistributedContext,
    directory: RunDirectory,
    check_memory: bool,
    before: Observer | None,
    after: Observer | None,
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
    if check_memory:
        refuse_what_cannot_fit(config, checkpoint, data.train, context)
    model, report = load_model(checkpoint, config.model, context, lambda model: _adapt(model, config))
    context.refuse_disagreement(_input_digests(model, data))
    check_savable(model)
    context.say(str(report))
    trainer = Trainer(
        model,
        data.train,
        config.training,
        context,
        data.pad_id,
        evaluate_every=config.evaluation.every,
        packing=_packing(config),
    )
    context.say(str(trainer.batch_sizes()))
    settings = _settings(config, model, data)
    start = _restore(trainer, directory, resume, settings)
    manifest = _manifest(config, model, data, report, context)
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
    if before is not None:
        before(model, tokenizer, data)
        reset_peak_memory(context.device)
    _train(trainer, directory, config, settings, start, tokenizer, data, shots)
    steps: list[StepMetrics] = []
    with context.raise_on_all_ranks():
        if context.is_main:
            from qdora.experiments.plots import plot_loss  # with matplotlib

            steps = read_metrics(directory.metrics_file)
            trained = describe(config.model.quantization, config.adapter, config.training.mode)
            plot_loss({trained: steps}, directory.loss_plot, f"Training loss, {directory.path.name}")
    # Last, since a run that has its adapter counts as finished.
    save_adapter(model, directory.adapter if context.is_main else None)
    if context.is_main:
        print(_summary(directory, report, steps))
    if after is not None:
        after(model, tokenizer, data)


def read_inputs(config: RunConfig) -> tuple[Checkpoint, PreTrainedTokenizerBase, PreparedData]:
    """Open the base model and tokenize the data; no weight is read.

    Raises: InputError: the model, its tokenizer or the data are missing or cannot be used.
    """
    check_run(config)
    checkpoint = open_checkpoint(config.model.path, config.model.revision)
    tokenizer = required_tokenizer(checkpoint)
    context_length = getattr(checkpoint.config, "max_position_embeddings", None)
    data, rows = prepare(config.data, tokenizer, context_length), embedding_rows(checkpoint.config)
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
    meta, report = build_adapted(checkpoint, config.model, context, lambda model: _adapt(model, config))
    with context.raise_on_all_ranks():
        check_savable(meta.model)
        check_output_layer(meta.model)
        if _packing(config).joined:
            check_packing(meta.model.config)
        if config.evaluation.quantization is not None:
            # Whether that format holds every layer must not be found out after the training.
            checkpoint = open_checkpoint(config.model.path, config.model.revision)
            build_model(checkpoint, torch.float32, Quantization(config.evaluation.quantization))
        return _manifest(config, meta.model, data, report, context)


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
        context.start_trackers(_flat(config.model_dump(mode="json")))
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
                step, trainer.optimizer.state(), position, lambda folder: save_adapter(trainer.model, folder)
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


def _packing(config: RunConfig) -> Packing:
    return Packing.of(config.data.packing, config.data.max_length)


def _adapt(model: PreTrainedModel, config: RunConfig) -> InjectionReport:
    return adapt(model, config.adapter, config.training.mode, seed=config.training.seed)


def _input_digests(model: PreTrainedModel, data: PreparedData) -> dict[str, str]:
    """Short digests of what every rank must have read the same, each from its own disk."""
    named = {f"the {part} data": value[:16] for part, value in data.fingerprints.items()}
    return {**named, "the base model": str(base_fingerprint(model))[:16]}


def _manifest(
    config: RunConfig,
    model: PreTrainedModel,
    data: PreparedData,
    report: InjectionReport,
    context: DistributedContext,
) -> dict[str, Any]:
    training, lengths = config.training, [len(example.input_ids) for example in data.train]
    rows = _packing(config).row_tokens
    order = hashlib.sha256(
        repr((training.seed, training.batch_size, lengths, *([] if rows is None else [rows]))).encode()
    )
    plan = BatchPlan(lengths, training.batch_size, training.seed, rows)
    fields = {
        "base": {"fingerprint": base_fingerprint(model), "parameters": report.total - report.trainable},
        "data": data.counts(),
        "trainable_parameters": report.trainable,
        "initial_a": initial_update_fingerprint(model),
        "batch_order": order.hexdigest(),
        "steps": count_steps(training, plan.steps_per_epoch),
        "compute_dtype": str(compute_dtype(config.model.dtype, context.device)),
    }
    return make_manifest(config, world_size=context.world_size, fields=fields)


def _settings(config: RunConfig, model: PreTrainedModel, data: PreparedData) -> dict[str, Any]:
    """What a resumed run must agree on with the one that wrote a checkpoint."""
    flat = _flat(config.model_dump(mode="json", include={"model", "adapter", "training"}))
    return {
        **{key: value for key, value in flat.items() if key not in _FREE_TO_CHANGE},
        "data.train": data.fingerprints["train"],
        "data.prompt": config.data.prompt,
        # Joining a step's sequences changes its rounding only; filling rows changes which they are.
        "data.max_length of filled rows (data.packing: stream)": _packing(config).row_tokens,
        # Where no text holds a special token it decides nothing.
        "data.parse_special_tokens": config.data.parse_special_tokens if data.special_text else None,
        "base": base_fingerprint(model),
    }


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Plain values by dotted key, as trackers take them."""
    return {k: ", ".join(map(str, v)) if isinstance(v, list) else v for k, v in dotted(tree).items()}


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
