"""Bytes on the loopback interface in a sharded training step over gloo, next to the formula's.

    python -m tools.wire_bytes          # the 135M model, 2 and 4 processes

The interface counts what all processes of the machine send over it, so nothing else should use it meanwhile.
Gloo has no reduce-scatter: torch sums everything on every process and lets each keep its part, which sends
twice as much.  The last column is the count over the formula with that.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tabulate import tabulate

from qdora.adapters.inject import inject
from qdora.config import AdapterConfig, ModelConfig, TrainingConfig
from qdora.data.tokenize import TokenizedExample
from qdora.distributed.context import DistributedContext
from qdora.distributed.launch import FsdpSettings
from qdora.models.load import load_model
from qdora.models.sources import open_checkpoint
from qdora.planner.architecture import find_architecture
from qdora.planner.scaling import traffic
from qdora.planner.simulate import Launch
from qdora.training.loop import Callbacks, Trainer
from tools.sharded_memory import PACKAGED, ROOT

LENGTH, STEPS = 32, 2
MODEL = ModelConfig(path=PACKAGED, dtype="float32")
ADAPTER = AdapterConfig(r=16)


def main() -> None:
    """Count, compute, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--processes", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        count()
        return
    rows = []
    for world_size in arguments.processes:
        launch = Launch(ADAPTER, training(world_size), LENGTH, world_size, FsdpSettings(), "cpu")
        architecture = find_architecture(MODEL, None, "cpu")
        moved = traffic(architecture, launch)
        expected = world_size * moved.sent
        with_sums = expected + (world_size - 1) * moved.scattered
        counted = launched(world_size)
        rows.append([world_size, expected / 1e6, with_sums / 1e6, counted / 1e6, counted / with_sums])
    titles = ["processes", "formula, MB", "with gloo's sums, MB", "on the wire, MB", "ratio"]
    print(tabulate(rows, headers=titles, floatfmt=".3f"))


def training(world_size: int) -> TrainingConfig:
    return TrainingConfig(max_steps=STEPS, batch_size=2 * world_size, gradient_accumulation=2)


def launched(world_size: int) -> float:
    """Bytes of one step of a launch."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    command = [sys.executable, *torchrun, "-m", "tools.wire_bytes", "--child"]
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, check=True)
    (found,) = re.findall(r"COUNTED (\d+)", done.stdout)
    return int(found) / STEPS


def count() -> None:
    """As one of the processes: train, and let the first one read the interface before and after."""
    context = DistributedContext.from_launch()
    model, _ = load_model(open_checkpoint(PACKAGED), MODEL, context, lambda m: inject(m, ADAPTER))
    example = TokenizedExample(torch.arange(3, 3 + LENGTH).tolist(), 1, "")
    settings = training(context.world_size)
    trainer = Trainer(model, [example] * settings.batch_size, settings, context, pad_id=0)
    dist.barrier()
    before = sent()
    trainer.run(0, Callbacks(log=lambda m: None, save=lambda s: None, evaluate=lambda s: None))
    dist.barrier()
    if context.is_main:
        print(f"COUNTED {sent() - before}", flush=True)
    context.end()


def sent() -> int:
    """Bytes that the loopback interface has sent since it came up."""
    line = next(x for x in Path("/proc/net/dev").read_text().splitlines() if x.strip().startswith("lo:"))
    return int(line.partition(":")[2].split()[8])


if __name__ == "__main__":
    main()
