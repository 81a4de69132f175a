"""A full training step, ours and PEFT's: loss, backward, optimizer."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from qdora.adapters.inject import adapted_layers, inject
from qdora.benchmark.measure import Arm, alternate, ratio, square_product, timed
from qdora.benchmark.peers import peft_model
from qdora.config import AdapterConfig, ModelConfig, TrainingConfig
from qdora.data.batches import IGNORED_LABEL, Batch
from qdora.memory import keep_freed_memory
from qdora.models.load import load_base
from qdora.training.loss import completion_loss
from qdora.training.optimizer import AdapterOptimizer

GOALS = {("qdora", "peft qdora"): 0.70, ("qdora", "peft qlora"): 0.80}
"""The largest ratios that are wanted, on two CPU cores in float32."""

GEMM_SHARE_GOAL = 0.80
"""Of the machine's rate, by the necessary flops of our QDoRA step."""


def benchmark_step(
    model: ModelConfig,
    adapter: AdapterConfig,
    training: TrainingConfig,
    batch: Batch,
    dtype: torch.dtype,
    device: torch.device,
    rounds: int,
) -> dict[str, Any]:
    """Medians in seconds, ratios, and the share of the machine's product rate.

    Args:
        batch: one batch, the same in every step and arm.
    """
    keep_freed_memory()
    models = {
        name: _our_model(dora, model, adapter, device) for name, dora in (("qdora", True), ("qlora", False))
    }
    arms = {name: _our_step(ours, training, batch, device) for name, ours in models.items()}
    dense, _ = load_base(model.path, quantization="none", dtype=dtype, device=device, revision=model.revision)
    for name, dora in (("peft qdora", True), ("peft qlora", False)):
        peer = peft_model(dense, adapter, dora=dora, compute=dtype)
        arms[name] = _peer_step(peer, training, batch, device)
    del dense
    seconds = alternate(arms, rounds, warmup=3, title="training step")
    own = arms["qdora"]
    arms.clear()  # and with them the peers' memory
    return {
        "batch": list(batch.input_ids_BT.shape),
        "labels": int((batch.labels_BT[:, 1:] != IGNORED_LABEL).sum()),
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "ratios": [
            {"arm": arm, "peer": peer, "ratio": ratio(seconds, arm, peer), "goal": goal}
            for (arm, peer), goal in GOALS.items()
        ],
        "gemm": _gemm_share(own, necessary_flops(models["qdora"], batch), dtype, device, rounds),
    }


def _gemm_share(
    step: Arm, flops: int, dtype: torch.dtype, device: torch.device, rounds: int
) -> dict[str, float]:
    """The rate of a step's necessary flops against that of a large product, round by round."""
    product, product_flops = square_product(dtype, device)
    seconds = alternate({"step": step, "product": product}, rounds, warmup=3, title="share of products")
    return {
        "machine_flops_per_second": product_flops / statistics.median(seconds["product"]),
        "step_flops": flops,
        "step_seconds": statistics.median(seconds["step"]),
        "share": flops / product_flops * ratio(seconds, "product", "step"),
        "goal": GEMM_SHARE_GOAL,
    }


def necessary_flops(model: PreTrainedModel, batch: Batch) -> int:
    """Flops of the products that a step cannot do without, a multiply and an add counted as two.

    W x and Wᵀ v of each layer, the six products with A and B, W Aᵀ for the norm, causal attention (half
    of its square) and the output layer where there are labels.
    """
    b, t = batch.input_ids_BT.shape
    labels = int((batch.labels_BT[:, 1:] != IGNORED_LABEL).sum())
    text = model.config.get_text_config()
    head = model.get_output_embeddings()
    flops = 4 * labels * head.out_features * head.in_features
    for layer in adapted_layers(model).values():
        o, i, r = layer.out_features, layer.in_features, layer.update.r if layer.update else 0
        flops += 4 * b * t * o * i + 6 * b * t * r * (o + i)
        flops += 2 * o * i * r if layer.magnitude is not None else 0
    width = text.num_attention_heads * getattr(text, "head_dim", text.hidden_size // text.num_attention_heads)
    # Scores and their product with the values; backward has five such products for the two of forward.
    attention = (2 + 5) * 2 * b * t * t * width // 2
    return int(flops + text.num_hidden_layers * attention)


def _name(dtype: torch.dtype) -> Any:
    return str(dtype).removeprefix("torch.")


def _our_model(
    dora: bool, config: ModelConfig, adapter: AdapterConfig, device: torch.device
) -> PreTrainedModel:
    model, _ = load_base(
        config.path, quantization="nf4", dtype=config.dtype, device=device, revision=config.revision
    )
    inject(model, adapter.model_copy(update={"dora": dora}))
    model.train()
    return model


def _our_step(model: PreTrainedModel, training: TrainingConfig, batch: Batch, device: torch.device) -> Arm:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = AdapterOptimizer(parameters, training)
    ids_BT, labels_BT = batch.input_ids_BT.to(device), batch.labels_BT.to(device)

    def step() -> None:
        optimizer.zero_grad()
        completion_loss(model, ids_BT, labels_BT).backward()
        nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step(training.learning_rate)

    return lambda: timed(step, device)


def _peer_step(model: nn.Module, training: TrainingConfig, batch: Batch, device: torch.device) -> Arm:
    """As PEFT's users train: the model's own loss, torch's AdamW on float32 adapters."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=training.learning_rate, fused=True)
    ids_BT, labels_BT = batch.input_ids_BT.to(device), batch.labels_BT.to(device)

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=ids_BT, labels=labels_BT, use_cache=False).loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return lambda: timed(step, device)
