"""A rank that trains a PEFT model in transformers' Trainer under DeepSpeed, with `accelerate` and without."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments

import qdora
from qdora.adapters import peft_layers
from tests.distributed.accelerated import IDS, LABELS, build

ROWS = [{"input_ids": i, "labels": l} for _ in range(6) for i, l in zip(IDS, LABELS, strict=True)]


def losses(folder: Path, stage: int, *, four_bit: bool, accelerated: bool) -> list[float]:
    zero = {"zero_optimization": {"stage": stage}} | dict.fromkeys(
        ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size"), "auto"
    )
    settings = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1}
    # Before the model: ZeRO 3 shards what is made after it.
    arguments = TrainingArguments(
        folder, deepspeed=zero, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, **settings
    )
    model = build(four_bit)
    if accelerated:
        qdora.accelerate(model, logits="labelled")

    def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

    trainer = Trainer(model, arguments, collate, ROWS)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main(folder: Path, stage: int, four_bit: bool) -> None:
    seen = []
    own = peft_layers._forward
    peft_layers._forward = lambda *words: (seen.append(1), own(*words))[1]
    both = [
        losses(folder, stage, four_bit=four_bit, accelerated=accelerated) for accelerated in (False, True)
    ]
    found = {"theirs": both[0], "ours": both[1], "passes": len(seen)}
    (folder / f"{torch.distributed.get_rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "nf4")
