"""Tokens per second of training steps with sequences padded, joined and in filled rows.

    python -m tools.packing_speed CONFIG [--set KEY=VALUE ...] [--steps N] [--rounds N] [--arms none,batch]
    python -m tools.packing_speed CONFIG --rounds 0     padding's share alone; no model is loaded

One model, loaded once, trained on by all arms in turn, each second round in the opposite order: a ratio is
the median over rounds of the ratio within the round, by time and by the CPU time of the process, in which
other work on the machine counts less.  Tokens are those of the examples, padding not.  `none` and `batch`
take the same batches; `stream` takes as many rows a step as hold about as many tokens.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import numpy as np
import torch
from tabulate import tabulate

from qdora.adapters.adapt import adapt
from qdora.commands.train import read_inputs
from qdora.config import PackingName, RunConfig
from qdora.config_file import load_config
from qdora.data.batches import BatchPlan, Packing
from qdora.distributed.context import DistributedContext
from qdora.models.formats import Checkpoint
from qdora.models.load import load_model
from qdora.resources import keep_freed_memory
from qdora.tasks.prepare import PreparedData
from qdora.training.loop import StopRequest, Trainer

ARMS: tuple[PackingName, ...] = ("none", "batch", "stream")


def print_shares(data: PreparedData, config: RunConfig) -> None:
    """Padding's share of an epoch, in batches of like lengths, as training has them, and without that."""
    lengths, size = [len(example.input_ids) for example in data.train], config.training.batch_size
    plan = BatchPlan(lengths, size, config.training.seed)
    order = [int(i) for i in np.random.default_rng(0).permutation(len(lengths))]
    plans = {
        "sorted": [plan.batch(step) for step in range(plan.steps_per_epoch)],
        "in random order": [order[start : start + size] for start in range(0, len(order), size)],
    }
    for name, batches in plans.items():
        padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
        print(f"padding of batches of {size}, {name}: {100 * (1 - sum(lengths) / padded):.1f}%")


def make_trainers(
    checkpoint: Checkpoint, data: PreparedData, config: RunConfig, names: list[PackingName]
) -> dict[PackingName, Trainer]:
    """A trainer of the same model for each arm."""
    context = DistributedContext()
    training, longest = config.training, config.data.max_length
    model, _ = load_model(
        checkpoint, config.model, context, lambda model: adapt(model, config.adapter, training.mode)
    )
    mean = statistics.mean(len(example.input_ids) for example in data.train)
    trainers = {}
    for name in names:
        rows = training.batch_size * (mean / longest if name == "stream" else 1)
        own = training.model_copy(update={"batch_size": max(1, round(rows))})
        packing = Packing.of(name, longest)
        trainers[name] = Trainer(model.train(), data.train, own, context, data.pad_id, packing=packing)
        print(f"{name}: {trainers[name].batch_sizes()}", flush=True)
    return trainers


def take(trainer: Trainer, first: int, steps: int) -> tuple[float, float]:
    """Tokens per second, and per second of CPU time, of some steps."""
    tokens, started, cpu_started = 0, time.perf_counter(), time.process_time()
    for step in range(first, first + steps):
        metrics, _ = trainer._step(step, trainer.prepare(step), StopRequest())
        tokens += metrics.tokens
    return tokens / (time.perf_counter() - started), tokens / (time.process_time() - cpu_started)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps of an arm in a round")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--arms", default=",".join(ARMS))
    arguments = parser.parse_args()
    keep_freed_memory()
    names = [name for name in ARMS if name in arguments.arms.split(",")]
    config = load_config(arguments.config, arguments.set)
    checkpoint, _, data = read_inputs(config)
    print_shares(data, config)
    if arguments.rounds < 1:
        return
    trainers = make_trainers(checkpoint, data, config, names)
    rates: dict[PackingName, list[tuple[float, float]]] = {name: [] for name in names}
    for i in range(arguments.rounds + 1):
        for name in names if i % 2 else reversed(names):
            rates[name].append(take(trainers[name], i * arguments.steps, arguments.steps))
        print(f"round {i}", file=sys.stderr)
    rows = []
    for name, found in rates.items():
        pairs = list(zip(found[1:], rates[names[0]][1:], strict=True))  # the first round warms up
        by_time, by_cpu = (statistics.median(own[k] / first[k] for own, first in pairs) for k in (0, 1))
        rate, cpu_rate = (statistics.median(column) for column in zip(*found[1:], strict=True))
        rows.append((name, f"{rate:.0f}", f"{by_time:.3f}", f"{cpu_rate:.0f}", f"{by_cpu:.3f}"))
    headers = ["packing", "tokens/s", f"/ {names[0]}", "tokens per CPU second", f"/ {names[0]}"]
    print(f"{torch.get_num_threads()} threads")
    print(tabulate(rows, headers=headers, disable_numparse=True))


if __name__ == "__main__":
    main()
