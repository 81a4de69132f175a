"""The training loop: a global batch, this rank's micro-batches, one optimizer step, the callbacks.

The loop knows nothing of evaluation or files beyond its callbacks.  Every random draw of a step follows from
seed, step and rank, so a resumed run needs no generator's state.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from qdora.adapters.full import trained_storage
from qdora.adapters.inject import adapted_layers
from qdora.config import TrainingConfig
from qdora.data.batches import (
    NO_PACKING,
    Batch,
    BatchPlan,
    Packing,
    collate,
    describe_batches,
    divide,
    without_labels,
)
from qdora.data.stream import ExampleStream
from qdora.data.token_table import lengths_of
from qdora.data.tokenize import TokenizedExample
from qdora.distributed.context import DistributedContext
from qdora.distributed.fsdp import as_forward
from qdora.errors import InputError, InterruptedRunError
from qdora.resources import SlowdownWatch, keep_freed_memory
from qdora.signals import REPEATED, STOPPING, StopSignal
from qdora.training.attention import check_packing, training_attention
from qdora.training.layers import prepare_layers
from qdora.training.loss import check_output_layer, completion_loss
from qdora.training.metrics import StepMetrics, peak_memory
from qdora.training.optimizer import AdapterOptimizer, local_shard
from qdora.training.schedule import learning_rate

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class DivergedError(InputError):
    """The loss, its gradient or a parameter left all bounds; the message names step and batch or tensor."""


LARGEST_PARAMETER = torch.finfo(torch.float16).max
"""A parameter beyond it has diverged, even if the loss is finite: DoRA divides by a norm that overflows."""


def _nothing(_: object) -> None:
    pass


def _go_on(_: int) -> bool:
    return False


def _same_rate(_: str) -> float:
    return 1.0


@dataclass(frozen=True)
class Callbacks:
    """What the loop calls after steps; by default nothing.

    Attributes:
        log: after every step, on the main rank.
        validate: before the first step, after `validate_every` steps and the last, with the steps done;
            whether to stop, the same on all ranks; a collective.
        save: after `save_every` steps, the last step and a stop, with the steps done; a collective.
        evaluate: after `evaluate_every` steps but the last, with the steps done, and once more where a run
            goes on from there; a collective.
    """

    log: Callable[[StepMetrics], None] = _nothing
    validate: Callable[[int], bool] = _go_on
    save: Callable[[int], None] = _nothing
    evaluate: Callable[[int], None] = _nothing


@dataclass(frozen=True)
class StepBatch:
    """What one optimizer step trains on.

    Attributes:
        examples: of all ranks.
        micro_batches: of this rank, on the CPU.
    """

    examples: list[TokenizedExample]
    micro_batches: list[Batch]


class Trainer:
    """Trains the trainable parameters of a model on tokenized examples.

    Args:
        model: causal language model; its trainable parameters are the adapter, or all of them.
        examples: the training set, the same list on every rank.
        config: steps, batch, rates.
        context: the ranks over which each batch is divided.
        pad_id: token of padding.
        evaluate_every: steps between evaluations; None for none.
        validate_every: steps between validations; None for none.
        packing: how examples share the rows of a micro-batch.
        rate_ratio: as for `AdapterOptimizer`.
        stream: what is trained on instead of the examples, which are some of its first ones.
    Raises: InputError: the batch does not divide over the ranks, or the model's output layer, or joining
        sequences for its attention, is not supported.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        examples: Sequence[TokenizedExample],
        config: TrainingConfig,
        context: DistributedContext,
        pad_id: int,
        evaluate_every: int | None = None,
        packing: Packing = NO_PACKING,
        validate_every: int | None = None,
        rate_ratio: Callable[[str], float] = _same_rate,
        stream: ExampleStream | None = None,
    ) -> None:
        check_output_layer(model)
        if packing.joined:
            check_packing(model.config)
        self.micro_batch_size = micro_batch_size(config, context.world_size)
        self.model, self.examples, self.config = model, examples, config
        self.context, self.pad_id, self.evaluate_every = context, pad_id, evaluate_every
        self.packing, self.validate_every, self.stream = packing, validate_every, stream
        self._lengths = lengths_of(examples)
        self.plan = BatchPlan(self._lengths, config.batch_size, config.seed, packing.row_tokens)
        self.total_steps = count_steps(config, self.plan.steps_per_epoch)
        self.parameters: dict[str, nn.Parameter] = {
            name: p for name, p in model.named_parameters() if p.requires_grad
        }
        self.optimizer = AdapterOptimizer(self.parameters, config, trained_storage(model), rate_ratio)
        self.loss = as_forward(model, completion_loss)
        self._adapted = list(adapted_layers(model).values())
        on_cpu = context.is_main and context.device.type == "cpu"
        self._slowdown = SlowdownWatch(torch.get_num_threads()) if on_cpu else None
        prepare_layers(model, config, context.fsdp, context.device)

    def run(self, start: int, callbacks: Callbacks) -> None:
        """Train from step `start` (steps already done) to the end, or to where a validation stops it.

        Raises: DivergedError: a loss is not finite, or a parameter that would be saved.
            InterruptedRunError: asked to stop; a checkpoint was written.
        """
        self.model.train()
        keep_freed_memory()
        # Where a device computes, its next batch is ready when it asks for it.
        with StopRequest() as stop, ThreadPoolExecutor(1, "batches") as ahead:
            if start < self.total_steps:
                following = ahead.submit(self.prepare, start)
            if start:
                self._evaluate(start, callbacks)  # a kill or a stop may have come before it
            stopped = self._validate(start, callbacks)
            for step in range(start, start if stopped else self.total_steps):
                batch = following.result()
                if step + 1 < self.total_steps:
                    following = ahead.submit(self.prepare, step + 1)
                metrics, signal_number = self._step(step, batch, stop)
                if self.context.is_main:
                    callbacks.log(metrics)
                done = step + 1
                last = done == self.total_steps
                if signal_number and not last:
                    self._refuse_divergence(done)
                    callbacks.save(done)
                    raise InterruptedRunError(
                        f"stopped after step {done} of {self.total_steps}, a checkpoint was written; "
                        f"continue with --resume",
                        128 + signal_number,
                    )
                # Before the checkpoint, which has what the validation came to.
                last = self._validate(done, callbacks) or last
                if last or (self.config.save_every and done % self.config.save_every == 0):
                    self._refuse_divergence(done)
                    callbacks.save(done)
                if last:
                    break
                self._evaluate(done, callbacks)
        self.model.eval()

    def _validate(self, done: int, callbacks: Callbacks) -> bool:
        """Whether training stops here."""
        every = self.validate_every
        if not every or (done % every and done < self.total_steps):
            return False
        self._refuse_divergence(done)
        stop = callbacks.validate(done)
        self.model.train()
        return stop

    def _evaluate(self, done: int, callbacks: Callbacks) -> None:
        if self.evaluate_every and done % self.evaluate_every == 0 and done < self.total_steps:
            callbacks.evaluate(done)
            self.model.train()

    def batch_sizes(self) -> str:
        """A sentence on the tokens of a step and what padding costs, over the first epoch."""
        if self.stream is not None:
            tokens = self.config.batch_size * sum(self._lengths) / len(self._lengths)
            return f"batches: about {tokens:,.0f} tokens a step by the first rows; not sorted by length"
        return describe_batches(
            self.plan, self._lengths, self.total_steps, self.micro_batch_size, self.packing
        )

    def prepare(self, step: int) -> StepBatch:
        """The batch of optimizer step `step`, counted from 0; it follows from the step alone."""
        if self.stream is not None:
            rows = [[example] for example in self.stream.batch(step, self.config.batch_size)]
        else:
            rows = [[self.examples[i] for i in row] for row in self.plan.rows(step)]
        return StepBatch([example for row in rows for example in row], self.batches(rows))

    def batches(self, rows: list[list[TokenizedExample]]) -> list[Batch]:
        """This rank's micro-batches of rows that all ranks share, on the CPU."""
        batches = [self._collate(chunk) for chunk in self._own_chunks(rows)]
        if self.context.fsdp is not None:
            # Forward and backward of a sharded model are collectives: every rank runs as many of them.
            most = -(-len(rows) // (self.micro_batch_size * self.context.world_size))
            shortest = self._collate([min(rows, key=_tokens)])
            batches += [without_labels(shortest)] * (most - len(batches))
        if self.context.device.type == "cuda":
            batches = [batch.pinned() for batch in batches]
        return batches

    def _own_chunks(self, rows: list[list[TokenizedExample]]) -> list[list[list[TokenizedExample]]]:
        """This rank's rows, divided into micro-batches."""
        chunks = divide(list(map(_tokens, rows)), self.micro_batch_size, balanced=self.packing.joined)
        own = chunks[self.context.rank :: self.context.world_size]
        return [[rows[i] for i in chunk] for chunk in own]

    def _collate(self, rows: list[list[TokenizedExample]]) -> Batch:
        examples = [example for row in rows for example in row]
        if self.packing.joined:
            examples.sort(key=lambda e: len(e.input_ids))  # equal ones attend as a batch
        return collate(examples, self.pad_id, joined=self.packing.joined)

    def _micro_batches(self, batch: StepBatch) -> Iterator[Batch]:
        """This rank's micro-batches on the device."""
        for micro_batch in batch.micro_batches:
            yield micro_batch.to(self.context.device)

    def _step(self, step: int, batch: StepBatch, stop: StopRequest) -> tuple[StepMetrics, int | None]:
        """One optimizer step; its metrics, and the signal to stop for on any rank.

        The host waits for the device once, for the figures that are logged, when the update is under way.
        """
        started, cpu_started = time.perf_counter(), time.process_time()
        tokens = _tokens(batch.examples)
        labels = sum(e.labels for e in batch.examples)
        # A generator takes 63 bits; a seed may be any number, a time in milliseconds for example.
        seed = ((self.config.seed * 1_000_003 + step) * 1_009 + self.context.rank) % 2**63
        torch.manual_seed(seed)
        self.optimizer.zero_grad()
        loss = torch.zeros((), dtype=torch.float64, device=self.context.device)
        with training_attention(self.model):
            for micro_batch in self._micro_batches(batch):
                # Divided by the labels of the global batch: the sum over micro-batches and ranks is the mean
                # over tokens, however unevenly they are spread.
                part = self.loss(micro_batch) / labels
                part.backward()
                loss += part.detach()
        # A signal to one rank stops all ranks, after the same step.
        extras = torch.stack([loss, loss.new_full((), float(stop.number is not None))])
        summed = self.context.sum_gradients(self.parameters.values(), extras)
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.config.clip_norm or math.inf)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        figures = torch.stack([*summed, norm.to(summed)])
        rate = learning_rate(self.config, step, self.total_steps)
        self.optimizer.step(rate, skip=~(figures[0].isfinite() & figures[2].isfinite()))
        for layer in self._adapted:
            layer.refresh_norm()
        mean_loss, stopping, grad_norm = figures.tolist()
        if not (math.isfinite(mean_loss) and math.isfinite(grad_norm)):
            origins = ", ".join(e.origin for e in batch.examples)
            raise DivergedError(
                f"step {step + 1}: loss {mean_loss}, gradient norm {grad_norm}; no update was made. "
                f"Lower training.learning_rate or look at the batch: {origins}"
            )
        seconds = time.perf_counter() - started
        metrics = StepMetrics(
            step=step + 1,
            loss=mean_loss,
            lr=rate,
            grad_norm=grad_norm,
            tokens=tokens,
            tokens_per_second=tokens / seconds,
            peak_memory_bytes=peak_memory(self.context.device),
            seconds=seconds,
        )
        if self._slowdown is not None:
            slow = self._slowdown.observe(tokens, seconds, time.process_time() - cpu_started)
            if slow is not None:
                tqdm.write(f"step {step + 1}: {slow}", file=sys.stderr)
        return metrics, (stop.number or int(signal.SIGTERM)) if stopping else None

    @torch.no_grad()
    def _refuse_divergence(self, done: int) -> None:
        """Look at parameters that are to be saved, whose last update no loss has seen; a collective.

        Raises: DivergedError: on all ranks, with the first tensor.
        """
        locals_ = {name: local_shard(p) for name, p in self.parameters.items()}
        largest = {name: float(p.abs().max()) for name, p in locals_.items() if p.numel()}
        found = [(n, value) for n, value in largest.items() if not value <= LARGEST_PARAMETER]
        for name, value in self.context.gather(found):
            raise DivergedError(
                f"step {done}: after its update {name} holds a value of {value:g}; nothing of it was saved. "
                f"Lower training.learning_rate or set training.clip_norm"
            )


def _tokens(examples: Iterable[TokenizedExample]) -> int:
    return sum(len(example.input_ids) for example in examples)


def micro_batch_size(config: TrainingConfig, world_size: int) -> int:
    """Sequences in a micro-batch of one rank.

    Raises: InputError: the batch does not divide over the ranks and their micro-batches.
    """
    micro_batches = config.gradient_accumulation * world_size
    if config.batch_size % micro_batches == 0:
        return config.batch_size // micro_batches
    own, rest = divmod(config.batch_size, world_size)
    counts = [] if rest else [str(n) for n in range(1, own + 1) if own % n == 0]
    others = f", or training.gradient_accumulation {', '.join(counts)}" if counts else ""
    raise InputError(
        f"training.batch_size {config.batch_size} does not divide over {world_size} processes "
        f"x {config.gradient_accumulation} micro-batches; allowed: multiples of {micro_batches}{others}"
    )


def count_steps(config: TrainingConfig, steps_per_epoch: int) -> int:
    """Optimizer steps of the run."""
    if config.max_steps is not None:
        return config.max_steps
    assert config.epochs is not None
    return max(1, math.ceil(config.epochs * steps_per_epoch))


class StopRequest:
    """Context manager that notes a first SIGTERM or SIGINT, so that the step in progress can end.

    A second Ctrl-C interrupts at once, as a user expects; one that comes within a second is the first one,
    which reached this process twice.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._noted = -math.inf
        self._previous: dict[int, Any] = {}
        self._parent = os.getppid()

    def __enter__(self) -> StopRequest:
        for number in STOPPING:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def number(self) -> int | None:
        """The signal to stop for; None where there was none.

        `accelerate launch` does not pass SIGTERM on: its end shows as a change of parent process.
        """
        if self._received is None and os.getppid() != self._parent:
            return int(signal.SIGTERM)
        return self._received

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._received is None:
            self._received, self._noted = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._noted >= REPEATED:
            raise StopSignal(number)
