"""A training step of a PEFT model with `accelerate` and without, under transformers' own Trainer."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qdora.adapters.peft_model import Logits, accelerate, restore
from qdora.benchmark.peers import Arm, adapt_4bit, alternate, dense_copy, medians, now, ratios
from qdora.config import ModelConfig, RunConfig
from qdora.data.batches import Batch
from qdora.models.load import compute_dtype, load_base

if TYPE_CHECKING:
    from transformers import Trainer

ARMS: Mapping[str, Logits | None] = {"accelerated": "all", "labelled": "labelled", "peft": None}
"""Where the logits are computed in each arm, by `accelerate`; None where PEFT computes."""
PAIRS = (("accelerated", "peft"), ("labelled", "peft"))
"""Arm and peer whose ratio of times is reported."""
STEPS = 2
"""Steps of a call of the trainer that count, after one that does not: it makes the optimizer's state."""


def benchmark_peft(config: RunConfig, batch: Batch, device: torch.device, rounds: int) -> dict[str, Any]:
    """Median seconds of a step of each arm, and the ratios of `PAIRS`; the arms take turns with one model.

    Args:
        config: model, adapter and training settings.
        batch: one batch, the same in every step and arm.
    """
    dtype = compute_dtype(config.model.dtype, device)
    model = quantized_peft_model(config, device, dtype)
    arms = {name: _arm(model, config, batch, device, dtype, logits) for name, logits in ARMS.items()}
    report = accelerate(model)
    seconds = alternate(arms, rounds, warmup=1, title="Trainer step")
    return {
        "batch": list(batch.input_ids_BT.shape),
        "labels": len(batch.targets_N),
        "accelerated_layers": len(report.accelerated),
        "dora_layers": len(report.accelerated) + len(report.left),
        "seconds": medians(seconds),
        "ratios": ratios(seconds, PAIRS),
    }


def quantized_peft_model(config: RunConfig, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The configured model in NF4 as transformers loads it, with PEFT's DoRA, B off zero."""
    settings: ModelConfig = config.model
    dense, _ = load_base(settings.path, quantization="none", dtype=dtype, device=str(device))
    model: Any = dense_copy(dense, dtype)
    del dense
    model.is_loaded_in_4bit = True  # by which PEFT takes its class for such layers
    return adapt_4bit(model, settings, config.adapter, dora=True, compute=dtype)


def _arm(
    model: nn.Module,
    config: RunConfig,
    batch: Batch,
    device: torch.device,
    dtype: torch.dtype,
    logits: Logits | None,
) -> Arm:
    """Seconds of a step of the Trainer, from the forward pass to the optimizer's end."""
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    class Clock(TrainerCallback):
        """When a step began and ended."""

        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            """Wait for the device, then look at the clock."""
            self.begun = now(device)

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            """As above."""
            self.seconds.append(now(device) - self.begun)

    own = batch.to(device)
    labels_BT = torch.full_like(own.input_ids_BT, -100)  # what torch's cross entropy leaves out
    labels_BT.view(-1)[own.labelled_N + 1] = own.targets_N
    inputs = {"input_ids": own.input_ids_BT, "labels": labels_BT}

    def train() -> float:
        if logits is None:
            restore(model)
        else:
            accelerate(model, logits=logits)
        clock = Clock()
        with tempfile.TemporaryDirectory(prefix="qdora-benchmark-") as folder:
            arguments = TrainingArguments(
                folder,
                max_steps=1 + STEPS,
                per_device_train_batch_size=1,
                learning_rate=config.training.learning_rate,
                bf16=dtype == torch.bfloat16,
                use_cpu=device.type == "cpu",
                logging_strategy="no",
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
            )
            rows = [{"input_ids": 0}] * (1 + STEPS)
            trainer: Trainer = Trainer(model, arguments, lambda _: inputs, rows, callbacks=[clock])
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        return sum(clock.seconds[1:]) / STEPS

    return train
