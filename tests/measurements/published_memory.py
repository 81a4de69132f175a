"""Estimates next to the memory that AnswerDotAI/fsdp_qlora published for two 24 GB GPUs.

    python -m tests.measurements.published_memory

Published: benchmarks_03_2024.md of that repository, two RTX 3090, LLaMA-2, gradient checkpointing, FSDP; the
settings that its commands leave out are the defaults of its train.py: rank 64 on six projections, bf16.
`reserved` is what the allocator held at most, `allocated` what tensors took.  It takes the loss of all tokens
at once; the second estimate does so too.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from tabulate import tabulate

from qdora.config import AdapterConfig, Method, TrainingConfig
from qdora.distributed.launch import FsdpSettings
from qdora.models.build import Quantization
from qdora.models.formats.safetensors import read_config
from qdora.planner.estimate import Estimate, estimate
from qdora.planner.simulate import Architecture, Launch
from qdora.training import loss

MODELS = Path(__file__).parents[2] / "configs" / "models"
TARGETS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Published:
    """One of their runs: sequences on each GPU, tokens of each, peak in GiB and what it is a peak of."""

    model: str
    method: Method
    sequences: int
    length: int
    gib: float
    kind: str
    fsdp: FsdpSettings | None


SHARDED = FsdpSettings()
RUNS = (
    Published("llama-2-7b", "lora", 1, 512, 8.28, "allocated", SHARDED),
    Published("llama-2-7b", "lora", 1, 2048, 9.16, "allocated", SHARDED),
    Published("llama-2-7b", "qlora", 1, 512, 4.98, "reserved", SHARDED),
    Published("llama-2-7b", "qlora", 1, 2048, 5.21, "reserved", SHARDED),
    Published("llama-2-7b", "qlora", 4, 2048, 11.22, "reserved", SHARDED),
    Published("llama-2-7b", "qlora", 10, 2048, 20.97, "reserved", SHARDED),
    Published("llama-2-7b", "qlora", 8, 2048, 20.94, "reserved", None),
    Published("llama-2-70b", "qlora", 2, 2048, 14.92, "reserved", FsdpSettings(offload=True)),
)


def main() -> None:
    """Estimate every run and print both."""
    rows = []
    for run in RUNS:
        result = estimated(run)
        with mock.patch.object(loss, "CHUNK_BYTES", 2**60):
            at_once = estimated(run)
        shared = "no FSDP" if run.fsdp is None else "offload" if run.fsdp.offload else "FSDP"
        figures = [result.peak.total, at_once.peak.total, result.at_rest.total]
        rows.append(
            [
                run.model,
                f"{run.method}, {shared}",
                f"{run.sequences} x {run.length}",
                f"{run.gib:.2f} {run.kind}",
                *(f"{size / 2**30:.2f}" for size in figures),
            ]
        )
    titles = [
        "model",
        "method",
        "tokens a GPU",
        "published, GiB",
        "estimate",
        "all logits at once",
        "between steps",
    ]
    print(tabulate(rows, headers=titles, disable_numparse=True))


def estimated(run: Published) -> Estimate:
    """The same settings here."""
    quantization = Quantization() if run.method.startswith("q") else None
    architecture = Architecture(read_config(MODELS / run.model), torch.bfloat16, torch.bfloat16, quantization)
    launch = Launch(
        adapter=AdapterConfig(method=run.method, r=64, alpha=16, dropout=0.1, targets=TARGETS),
        training=TrainingConfig(
            max_steps=1, batch_size=2 * run.sequences, gradient_checkpointing=True, clip_norm=None
        ),
        max_length=run.length,
        world_size=2,
        fsdp=run.fsdp,
    )
    return estimate(architecture, launch)


if __name__ == "__main__":
    main()
