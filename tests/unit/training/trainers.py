"""A tiny trainer, how to run it, and what it ends with."""

from __future__ import annotations

import torch

from qdora.adapters.inject import adapted_layers, inject
from qdora.config import AdapterConfig, TrainingConfig
from qdora.data.batches import NO_PACKING
from qdora.data.tokenize import tokenize_examples
from qdora.distributed.context import DistributedContext
from qdora.models.load import load_base
from qdora.training.loop import Callbacks, Trainer
from qdora.training.metrics import StepMetrics
from tests.golden.curves import examples
from tests.tiny import cpu_context, tiny_tokenizer
from tests.unit.adapters.oracle import move_off_the_identity


def make_model(folder, *, dtype="float32", dropout=0.0, on_gpu=False, **adapter):
    compute, device = ("bfloat16", "cuda") if on_gpu else ("float32", "auto")
    model, _ = load_base(str(folder), dtype=compute, device=device)
    inject(model, AdapterConfig(r=4, alpha=12, dropout=dropout, dtype=dtype, **adapter), seed=3)
    for seed, layer in enumerate(adapted_layers(model).values()):
        move_off_the_identity(layer, seed)
    return model


def make_trainer(
    folder, *, count=20, dtype="float32", dropout=0.0, packing=NO_PACKING, on_gpu=False, **training
) -> Trainer:
    model = make_model(folder, dtype=dtype, dropout=dropout, on_gpu=on_gpu)
    data, _ = tokenize_examples(examples()[:count], tiny_tokenizer(), "question_answer", 128, "stop")
    settings = {"max_steps": 5, "batch_size": 8, "learning_rate": 5e-3} | training
    context = DistributedContext(device=torch.device("cuda", 0)) if on_gpu else cpu_context()
    return Trainer(model, data, TrainingConfig(**settings), context, pad_id=0, packing=packing)


def run(trainer: Trainer, start: int = 0, **callbacks) -> list[StepMetrics]:
    metrics: list[StepMetrics] = []
    trainer.run(start, Callbacks(**({"log": metrics.append} | callbacks)))
    return metrics


def parameters(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.parameters.items()}
