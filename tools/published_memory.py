"""Estimates next to the memory that AnswerDotAI/fsdp_qlora published for two 24 GB GPUs.

    python -m tools.published_memory

Published: benchmarks_03_2024.md of that repository, two RTX 3090, LLaMA-2, gradient checkpointing, FSDP; the
settings that its commands leave out are the defaults of its train.py: rank 64 on six projections, bf16.
`reserved` is what the allocator held at most, `allocated` what tensors took.  It takes the loss of all tokens
at once; the second estimate does so too.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from tabulate import tabulate

from qdora.config import AdapterConfig, QuantizationName, TrainingConfig
from qdora.distributed.launch import FsdpSettings
from qdora.models.formats.safetensors import read_config
from qdora.planner.architecture import Architecture
from qdora.planner.report import Estimate
from qdora.planner.shorten import estimate
from qdora.planner.simulate import Launch
from qdora.quant import Quantization
from qdora.training import loss

MODELS = Path(__file__).parents[1] / "configs" / "models"
TARGETS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Published:
    """One of their runs: sequences on each GPU, tokens of each, peak in GiB and what it is a peak of."""

    model: str
    quantization: QuantizationName
    sequences: int
    length: int
    gib: float
    kind: str
    fsdp: FsdpSettings | None


SHARDED = FsdpSettings()
RUNS = (
    Published("llama-2-7b", "none", 1, 512, 8.28, "allocated", SHARDED),
    Published("llama-2-7b", "none", 1, 2048, 9.16, "allocated", SHARDED),
    Published("llama-2-7b", "nf4", 1, 512, 4.98, "reserved", SHARDED),
    Published("llama-2-7b", "nf4", 1, 2048, 5.21, "reserved", SHARDED),
    Published("llama-2-7b", "nf4", 4, 2048, 11.22, "reserved", SHARDED),
    Published("llama-2-7b", "nf4", 10, 2048, 20.97, "reserved", SHARDED),
    Published("llama-2-7b", "nf4", 8, 2048, 20.94, "reserved", None),
    Published("llama-2-70b", "nf4", 2, 2048, 14.92, "reserved", FsdpSettings(offload=True)),
)


def main() -> None:
    """Estimate every run and print both."""
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    rows, chunk = [], loss.CHUNK_BYTES
    for run in RUNS:
        result = estimated(run)
        loss.CHUNK_BYTES = 2**60
        at_once = estimated(run)
        loss.CHUNK_BYTES = chunk
        sharding = "no FSDP" if run.fsdp is None else "offload" if run.fsdp.offload else "FSDP"
        figures = [result.peak.total, at_once.peak.total, result.at_rest.total]
        rows.append(
            [
                run.model,
                f"LoRA on {run.quantization}, {sharding}",
                f"{run.sequences} x {run.length}",
                f"{run.gib:.2f} {run.kind}",
                *(f"{size / 2**30:.2f}" for size in figures),
            ]
        )
    titles = ["model", "what", "tokens a GPU", "published, GiB"]
    titles += ["estimate", "all logits at once", "between steps"]
    print(tabulate(rows, headers=titles, disable_numparse=True))


def estimated(run: Published) -> Estimate:
    """The same settings here."""
    config, quantization = read_config(MODELS / run.model), Quantization(run.quantization)
    architecture = Architecture(config, torch.bfloat16, torch.bfloat16, quantization)
    launch = Launch(
        adapter=AdapterConfig(dora=False, r=64, alpha=16, dropout=0.1, targets=TARGETS),
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
