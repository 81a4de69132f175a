"""All layers of the model, with random weights: training beside its estimate, and decoding."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any, Literal

import torch

from qdora.benchmark.gpu.models import COMPUTE, adapter_config, random_batch, random_model, tiny_tokenizer
from qdora.benchmark.gpu.run import Figures, Setup, attempt
from qdora.benchmark.peers import timed
from qdora.config import TrainingConfig
from qdora.data.tokenize import TokenizedExample
from qdora.distributed.context import DistributedContext
from qdora.evaluation.generation import generate
from qdora.planner.architecture import Architecture
from qdora.planner.shorten import estimate
from qdora.planner.simulate import Launch
from qdora.quant import Quantization
from qdora.training.loop import Callbacks, Trainer
from qdora.training.metrics import StepMetrics, reset_peak_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WARMUP = 2
"""Steps that do not count."""


def training(setup: Setup, figures: Figures) -> None:
    """QDoRA steps of the training loop on all layers: tokens/s, and peak memory against `qdora estimate`."""
    rows = figures["training"] = []
    model = random_model(setup.size.config(), setup.device, dora=True)
    for checkpointing in (False, True):
        setup.clock.check()
        with attempt(figures, f"checkpointing {checkpointing}"):
            rows.append(_train(setup, model, checkpointing))


def _train(setup: Setup, model: PreTrainedModel, checkpointing: bool) -> dict[str, Any]:
    config, (sequences, tokens) = setup.size.config(), setup.size.batches[0]
    examples = [
        TokenizedExample(ids, 0, "random")
        for ids in random_batch(config, sequences, tokens).input_ids_BT.tolist()
    ]
    settings = TrainingConfig(
        max_steps=WARMUP + setup.size.rounds,
        batch_size=sequences,
        gradient_checkpointing=checkpointing,
        learning_rate=1e-5,
    )
    architecture = Architecture(config, COMPUTE, COMPUTE, Quantization("nf4"))
    device: Literal["cuda", "cpu"] = "cuda" if setup.device.type == "cuda" else "cpu"
    launch = Launch(adapter_config(True), settings, tokens, 1, None, device)
    expected = estimate(architecture, launch).peak.total
    trainer = Trainer(model, examples, settings, DistributedContext(device=setup.device), pad_id=0)
    metrics: list[StepMetrics] = []
    reset_peak_memory(setup.device)
    trainer.run(0, Callbacks(log=metrics.append))
    row = {
        "batch": f"{sequences}x{tokens}",
        "checkpointing": checkpointing,
        "tokens/s": statistics.median(m.tokens_per_second for m in metrics[WARMUP:]),
        "estimate, GiB": expected / 2**30,
    }
    if device == "cuda":
        allocated = torch.cuda.max_memory_allocated()
        row |= {
            "allocated, GiB": allocated / 2**30,
            "reserved, GiB": torch.cuda.max_memory_reserved() / 2**30,
            "estimate / allocated": expected / allocated,
        }
    return row


def decoding(setup: Setup, figures: Figures) -> None:
    """Greedy generation with the adapter on all layers."""
    config = setup.size.config()
    model = random_model(config, setup.device, dora=True)
    model.generation_config.eos_token_id = None
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None  # every answer has its full length
    rows = figures["decoding"] = []
    for batch in setup.size.decoding:
        setup.clock.check()
        prompts = random_batch(config, batch, setup.size.prompt).input_ids_BT.tolist()

        def decode(tokens: int, batch: int = batch, prompts: list[list[int]] = prompts) -> float:
            return timed(
                lambda: generate(
                    model, tokenizer, prompts, pad_id=0, max_new_tokens=tokens, batch_size=batch
                ),
                setup.device,
            )

        decode(1)
        # The prompt's pass is in both.
        seconds = decode(1 + setup.size.new_tokens) - decode(1)
        each = seconds / setup.size.new_tokens
        rows.append({"batch": batch, "tokens/s": batch / each, "ms a token": 1e3 * each})
