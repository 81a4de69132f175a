"""`train`: from a configuration to a run directory with a trained adapter."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from qdora.adapters.adapt import with_tokens
from qdora.adapters.fingerprint import base_fingerprint
from qdora.adapters.peft_io import check_savable
from qdora.config import RunConfig
from qdora.config_file import config_digest
from qdora.data.chat_templates import end_with_turns
from qdora.data.rows import Example
from qdora.data.vocabulary import check_ids, check_questions, fit_padding
from qdora.distributed.context import DistributedContext
from qdora.errors import not_installed
from qdora.evaluation.scores import Scores, write_scores
from qdora.files import fsync, wrap_os_errors
from qdora.models.build import build_model
from qdora.models.formats import Checkpoint
from qdora.models.load import build_adapted, load_model, put_saved
from qdora.models.sources import open_checkpoint
from qdora.planner.check import refuse_what_cannot_fit
from qdora.quant import Quantization
from qdora.run import RunDirectory, package_versions
from qdora.tasks import check_run
from qdora.tasks.prepare import PreparedData, Split, prepare, rendered, require_gold
from qdora.tasks.shots import draw_shots
from qdora.training.attention import check_packing
from qdora.training.best import ValidationState, save_best
from qdora.training.checkpoint import CheckpointWriter
from qdora.training.identity import input_digests, packing_of, run_manifest
from qdora.training.loop import Callbacks, Trainer
from qdora.training.loss import check_output_layer
from qdora.training.metrics import (
    StepMetrics,
    ValidationMetrics,
    append_metrics,
    keep_until,
    read_metrics,
    read_validations,
    reset_peak_memory,
)
from qdora.training.progress import TrainingBar, data_lines, summarize, trained_rows
from qdora.training.resume import agreed_settings, plain_values, restore, restore_best
from qdora.training.start import (
    adapt_run,
    check_settings,
    in_force,
    refuse_start_in_output,
    run_tokenizer,
    save_adapter_and_tokenizer,
    say_start,
    starts_with_template,
    table_rows,
    trained_ids,
)
from qdora.training.validation import HeldOut, Validator, hold_out

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Observer: TypeAlias = "Callable[[PreTrainedModel, PreTrainedTokenizerBase, PreparedData], None]"
"""Looks at a run's model, tokenizer and data."""


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
    refuse_start_in_output(config)
    context = context or DistributedContext.from_launch(config.training.trackers, config.output.dir)
    directory = RunDirectory(config.output.dir)
    context.refuse_disagreement({"the configuration": config_digest(config), **package_versions()})
    with context.raise_on_all_ranks():
        check_settings(config, context)
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
    reset_peak_memory(context.device)
    with context.raise_on_all_ranks():
        if resume is None:
            directory.refuse_if_used(config.output.overwrite)
        # Data first: a model is not quantized only to find a missing column.
        checkpoint, tokenizer, data = read_inputs(config)
        config = rendered(config, data)
        by_answers = config.training.keep_best == "exact_match"
        if by_answers:
            require_gold(data.validation, "validation")
        held_out = _hold_out(config, checkpoint, tokenizer, data, context)
        scored = [*(data.test if config.evaluation.every else ()), *(data.validation if by_answers else ())]
        shots = draw_shots(config, tokenizer, scored) if scored else {}
    for line in data_lines(data, config.data):
        context.say(line)
    if check_memory:
        refuse_what_cannot_fit(config, checkpoint, data.longest(config.data), context)
    model, adapted = load_model(
        checkpoint, config.model, context, lambda model: adapt_run(model, config, context)
    )
    base, config = adapted.start, in_force(config, adapted)
    context.refuse_disagreement(input_digests(model, data, base))
    if base is not None:
        put_saved(model, base, context)
        say_start(base, model, context)
    with context.raise_on_all_ranks():
        ids = trained_ids(tokenizer, checkpoint, config)
        report = with_tokens(model, adapted.report, config.adapter, ids)
        adapted = replace(adapted, report=report)
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
        validate_every=config.evaluation.loss_every,
        rate_ratio=config.adapter.rate_ratio,
        stream=data.stream,
    )
    context.say(str(trainer.batch_sizes()))
    settings = agreed_settings(config, data, base_fingerprint(model), base.digest if base else None)
    found = restore(trainer, directory, resume, settings)
    done, validation = (found.step, found.validation) if found else (0, ValidationState())
    manifest = run_manifest(config, model, data, adapted, context)
    del adapted, base  # with the tensors that were read
    with context.raise_on_all_ranks():
        if context.is_main:
            directory.clear_leftovers()
            if resume is None:
                directory.clear()
            if found is None:
                directory.start(config, manifest)
            else:
                directory.record_resume(config, found.step)
            restore_best(directory, found, config)
            missing = keep_until(directory.metrics_file, done, validation.step)
            if missing:
                context.say(f"{directory.metrics_file}: it lacks {missing} of the {done} steps done")
    if before is not None:
        before(model, tokenizer, data)
        reset_peak_memory(context.device)
    if config.training.trackers:
        context.start_trackers(plain_values(config.model_dump(mode="json")))
    checkpoints = CheckpointWriter(
        directory.checkpoints,
        settings,
        context,
        keep=config.training.keep_checkpoints,
        full_tensors=context.fsdp is not None and context.fsdp.state_dict_type == "full",
        in_background=config.training.async_checkpoints,
    )
    with TrainingBar(trainer.total_steps, done, shown=context.is_main) as bar, checkpoints:
        run = _Run(trainer, directory, config, tokenizer, data, shots, checkpoints, bar)
        run.train(done, held_out, validation)
    if config.training.trackers:
        context.end()
    with context.raise_on_all_ranks():
        if context.is_main and not_installed("matplotlib") is None:
            from qdora.experiments.plots import plot_run

            plot_run(directory)
    # Last, since a run that has its adapter counts as finished.
    run.save_adapter(directory.adapter if context.is_main else None)
    if context.is_main:
        from qdora.export.card import write_run_cards  # with transformers' generation

        write_run_cards(directory)
        steps, validations = read_metrics(lines := directory.metrics_file), read_validations(lines)
        rows = trained_rows(directory, report) | data.left_out_of_stream()
        print(summarize(directory, steps, validations, rows))
    if after is not None:
        after(model, tokenizer, data)


def _hold_out(
    config: RunConfig,
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    data: PreparedData,
    context: DistributedContext,
) -> HeldOut:
    """The validation examples whose loss is measured during training; none where it is not."""
    if not config.evaluation.loss_every:
        return {}
    held_out, skipped = hold_out(config.data, tokenizer, data.validation)
    if skipped:
        context.say(f"{len(skipped)} validation examples have no part in the loss, the first: {skipped[0]}")
    ids = ((example.origin, example.input_ids) for of_task in held_out.values() for example in of_task)
    check_ids(tokenizer, table_rows(tokenizer, checkpoint, config), ids)
    return held_out


def read_inputs(config: RunConfig) -> tuple[Checkpoint, PreTrainedTokenizerBase, PreparedData]:
    """Open the base model and tokenize the data; no weight is read.

    Raises: InputError: the model, its tokenizer or the data are missing or cannot be used.
    """
    check_run(config)
    checkpoint = open_checkpoint(config.model.path, config.model.revision)
    said: list[str | None] = []
    tokenizer = run_tokenizer(checkpoint, config, said.append)
    rows = table_rows(tokenizer, checkpoint, config)
    data = prepare(config.data, tokenizer, getattr(checkpoint.config, "max_position_embeddings", None))
    data = replace(data, keeps_template=data.keeps_template or starts_with_template(config))
    said.append(end_with_turns(tokenizer) if data.keeps_template else None)
    said.append(fit_padding(tokenizer, rows))
    if os.environ.get("RANK", "0") == "0":
        print(*(f"{sentence}\n" for sentence in said if sentence), sep="", end="", file=sys.stderr)
    check_ids(tokenizer, rows, ((example.origin, example.input_ids) for example in data.train))
    config = rendered(config, data)
    check_questions(tokenizer, rows, config.data, [*data.validation, *data.test[: config.evaluation.limit]])
    if data.stream is not None:
        data.stream.check = lambda sequences: check_ids(tokenizer, rows, sequences)
    return checkpoint, tokenizer, replace(data, pad_id=tokenizer.pad_token_id)


def plan_run(
    config: RunConfig, data: PreparedData, context: DistributedContext
) -> tuple[RunConfig, dict[str, Any]]:
    """Check everything about a run that needs no weight, its model on the meta device; a collective.

    Args:
        data: of `read_inputs`.
    Returns: the configuration in force, and the manifest that the run would write, but None for the base's
        fingerprint.
    Raises: InputError: an adapter or format does not fit the model, or the batch not the number of ranks.
    """
    with context.raise_on_all_ranks():
        check_settings(config, context)
        checkpoint = open_checkpoint(config.model.path, config.model.revision)
    meta, adapted = build_adapted(checkpoint, config.model, context, lambda m: adapt_run(m, config, context))
    config = in_force(config, adapted)
    with context.raise_on_all_ranks():
        if config.adapter.trainable_tokens is not None:
            ids = trained_ids(run_tokenizer(checkpoint, config), checkpoint, config)
            adapted = replace(adapted, report=with_tokens(meta.model, adapted.report, config.adapter, ids))
        check_savable(meta.model)
        check_output_layer(meta.model)
        if packing_of(config).joined:
            check_packing(meta.model.config)
        if config.evaluation.quantization is not None:
            # Whether that format holds every layer must not be found out after the training.
            checkpoint = open_checkpoint(config.model.path, config.model.revision)
            build_model(checkpoint, torch.float32, Quantization(config.evaluation.quantization))
        return config, run_manifest(config, meta.model, data, adapted, context)


class _Run:
    """The callbacks of a run: what happens after its steps."""

    def __init__(
        self,
        trainer: Trainer,
        directory: RunDirectory,
        config: RunConfig,
        tokenizer: PreTrainedTokenizerBase,
        data: PreparedData,
        shots: Mapping[str, Sequence[Example]],
        checkpoints: CheckpointWriter,
        bar: TrainingBar,
    ) -> None:
        self.trainer, self.context, self.directory, self.config = trainer, trainer.context, directory, config
        self.tokenizer, self.data, self.shots = tokenizer, data, shots
        self.checkpoints, self.bar = checkpoints, bar

    def train(self, start: int, held_out: HeldOut, state: ValidationState) -> None:
        by_answers = self.config.training.keep_best == "exact_match"
        self.validator = Validator(
            self.trainer,
            held_out,
            state,
            log=self.log_validation,
            keep=self.keep_best,
            score=self.exact_match if by_answers else None,
        )
        callbacks = Callbacks(log=self.log, validate=self.validate, save=self.save, evaluate=self.evaluate)
        self.trainer.run(start, callbacks)

    def log(self, metrics: StepMetrics) -> None:
        append_metrics(self.directory.metrics_file, metrics)
        self.bar.show(metrics)
        self.context.track(asdict(metrics), step=metrics.step)

    def log_validation(self, metrics: ValidationMetrics, is_best: bool) -> None:
        append_metrics(self.directory.metrics_file, metrics)
        self.bar.show_validation(metrics, is_best=is_best)
        self.context.track(metrics.tracked(), step=metrics.step)

    def validate(self, step: int) -> bool:
        self.bar.working("validating")
        stop = self.validator(step) and step < self.trainer.total_steps
        if stop:
            self.bar.say(
                f"step {step}: stopping early, the last {self.validator.state.since} validations were no "
                f"better than that after step {self.validator.state.best_step} (training.patience)"
            )
            with self.context.raise_on_all_ranks():
                if self.context.is_main:
                    self.directory.record(stopped_early=step)
        return stop

    def keep_best(self, state: ValidationState) -> None:
        measure = self.config.training.keep_best
        if measure is None:
            return
        save_best(self.save_adapter, self.directory.best_adapter, self.context)
        with self.context.raise_on_all_ranks():
            if self.context.is_main:
                self.directory.record(best=state.best(measure))

    def exact_match(self, step: int) -> float:
        everything = self.config.evaluation.model_copy(update={"limit": None})
        config = self.config.model_copy(update={"evaluation": everything})
        scores = self._score(config, "validation", self.directory.validation / f"step-{step}")
        return sum(score.correct for score in scores) / sum(score.total for score in scores)

    def evaluate(self, step: int) -> None:
        self.bar.working("evaluating")
        for score in self._score(self.config, "test", self.directory.evaluation / f"step-{step}"):
            self.bar.say(f"step {step}: {score}")
            if self.context.is_main:
                self.context.track({f"{score.task}/{score.metric}": score.score}, step=step)

    def _score(self, config: RunConfig, split: Split, folder: Path) -> list[Scores]:
        from qdora.evaluation.evaluate import evaluate_configured  # with transformers' generation

        examples = self.data.validation if split == "validation" else self.data.test
        scores = evaluate_configured(
            self.trainer.model,
            self.tokenizer,
            examples,
            config,
            self.context,
            shots=self.shots,
            split=split,
            show_progress=False,
        )
        if self.context.is_main:
            for score in scores:
                write_scores(score, folder)
        return scores

    def save_adapter(self, folder: Path | None) -> None:
        own = self.data.keeps_template or self.config.adapter.trainable_tokens is not None
        save_adapter_and_tokenizer(self.trainer.model, self.tokenizer if own else None, folder)

    def save(self, step: int) -> None:
        trainer, metrics_file = self.trainer, self.directory.metrics_file
        with self.context.raise_on_all_ranks(), wrap_os_errors(metrics_file):
            if self.context.is_main:
                fsync(metrics_file)  # a checkpoint must not outlive the steps before it
        epoch, batch = (0, step) if trainer.stream else divmod(step, trainer.plan.steps_per_epoch)
        self.checkpoints.save(
            step,
            trainer.optimizer.state(),
            {"seed": self.config.training.seed, "epoch": epoch, "batch": batch},
            self.save_adapter,
            validation=self.validator.state,
            best=self.directory.best_adapter if self.config.training.keep_best else None,
        )
