"""What sharded training steps hold and send, counted on every process.

torchrun --nproc-per-node N -m tests.distributed.traffic OUT MODEL
"""

from __future__ import annotations

import dataclasses
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator

from qdora.adapters.adapt import adapt
from qdora.config import AdapterConfig, ModelConfig, QuantizationName, TrainingConfig
from qdora.distributed.launch import FsdpSettings
from qdora.models.load import load_model
from qdora.models.sources import open_checkpoint
from qdora.planner.report import StepRecord
from qdora.planner.simulate import Launch
from qdora.signals import end
from tests.real_step import record_real_step
from tests.tiny import cpu_context


@dataclasses.dataclass(frozen=True)
class Case:
    adapter: dict[str, Any] = dataclasses.field(default_factory=dict)
    quantization: QuantizationName = "nf4"
    training: dict[str, Any] = dataclasses.field(default_factory=dict)
    fsdp: dict[str, Any] | None = dataclasses.field(default_factory=dict)


CASES = {
    "qdora": Case(training={"gradient_accumulation": 2}),
    "qlora recomputed": Case({"dora": False, "dropout": 0.1}, training={"gradient_checkpointing": True}),
    "kept": Case(fsdp={"reshard_after_forward": False}),
    "one group": Case(fsdp={"wrap": False}),
    "dora": Case(quantization="none"),
    "fp4": Case({"type": "vera", "r": 64}, "fp4"),
    "int8": Case(quantization="int8"),
    "head": Case({"dora": False, "targets": ("q_proj", "lm_head")}, "none"),
    "full": Case({"type": "none", "dora": False}, "none", {"mode": "full"}),
    "data parallel": Case(fsdp=None),
}


def launch_of(case: Case, world_size: int) -> Launch:
    training = {"max_steps": 1, "batch_size": 4 * world_size} | case.training
    return Launch(
        adapter=AdapterConfig(**({"r": 8} | case.adapter)),
        training=TrainingConfig(**training),
        max_length=40,
        world_size=world_size,
        fsdp=None if case.fsdp is None else FsdpSettings(**case.fsdp),
        device="cpu",
    )


GATHER, SCATTER = "all_gather_single", "reduce_scatter_single"
if not hasattr(dist, GATHER):  # before torch 2.13
    GATHER, SCATTER = "all_gather_into_tensor", "reduce_scatter_tensor"


class CountedCalls:
    """Bytes that the collectives of `torch.distributed` are given by this process while entered."""

    def __enter__(self) -> CountedCalls:
        self.sent: dict[str, int] = {}
        self._originals = {name: getattr(dist, name) for name in (GATHER, SCATTER)}
        for name, original in self._originals.items():
            setattr(dist, name, self._counted(name, original))
        return self

    def _counted(self, name: str, original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
            whole = max(tensors, key=lambda t: t.numel())
            self.sent[name] = self.sent.get(name, 0) + whole.numel() * whole.element_size()
            return original(*args, **kwargs)

        return call

    def __exit__(self, *_: object) -> None:
        for name, original in self._originals.items():
            setattr(dist, name, original)


def count(case: Case, launch: Launch, model: str) -> tuple[StepRecord, dict[str, int]]:
    """What a step of a freshly loaded model holds, and the bytes that it sends by each collective."""
    context = cpu_context(launch.fsdp)
    settings = ModelConfig(path=model, quantization=case.quantization, dtype="float32")
    adapted = partial(adapt, adapter=launch.adapter, mode=launch.training.mode)
    loaded, _ = load_model(open_checkpoint(model), settings, context, adapted)
    with CountedCalls() as calls:
        return record_real_step(loaded, launch, context), calls.sent


def main(out: Path, model: str) -> None:
    """Every process writes OUT/NAME-RANK.json."""
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    for name, case in CASES.items():
        launch = launch_of(case, accelerator.num_processes)
        first, again = (count(case, launch, model) for _ in range(2))
        record, calls = first
        # Gloo may hold on to what it has just moved for a moment longer than anybody needs it: seldom twice.
        peaks = {
            stretch: min(peak.total, again[0].peaks[stretch].total) for stretch, peak in record.peaks.items()
        }
        facts = {
            "peaks": peaks,
            "at_rest": {part.value: size for part, size in record.at_rest.items()},
            "exchanged": record.exchanged,
            "calls": calls,
        }
        (out / f"{name}-{accelerator.process_index}.json").write_text(json.dumps(facts))
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
    end(0)
