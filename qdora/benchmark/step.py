"""A full training step, ours and PEFT's: loss, backward, optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qdora.adapters.inject import adapted_layers, inject
from qdora.benchmark.peers import (
    Arm,
    alternate,
    autocast,
    medians,
    peft_model,
    ratio,
    ratios,
    square_product,
    timed,
)
from qdora.config import AdapterConfig, ModelConfig, RunConfig, TrainingConfig
from qdora.data.batches import Batch
from qdora.distributed.context import DistributedContext
from qdora.models.load import compute_dtype, load_model
from qdora.models.sources import open_checkpoint
from qdora.training.attention import training_attention
from qdora.training.loss import completion_loss
from qdora.training.optimizer import AdapterOptimizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PAIRS = (("qdora", "peft qdora"), ("qdora", "peft qlora"))
"""Arms and peers whose ratio of times is reported."""


def benchmark_step(config: RunConfig, batch: Batch, device: torch.device, rounds: int) -> dict[str, Any]:
    """Median seconds of each arm, the ratios of `PAIRS`, and the share of the machine's product rate.

    Args:
        config: model, adapter and training settings of all arms.
        batch: one batch, the same in every step and arm.
    """
    settings, dtype = config.model, compute_dtype(config.model.dtype, device)
    arms, flops = {}, {}
    for name, dora in (("qdora", True), ("qlora", False)):
        adapter = config.adapter.model_copy(update={"dora": dora})
        model = _load(settings.model_copy(update={"quantization": "nf4"}), device, adapter)
        flops[name] = necessary_flops(model, batch)
        arms[name] = our_step(model.train(), config.training, batch, device)
    dense = _load(settings.model_copy(update={"quantization": "none"}), device, None)
    for name, dora in (("peft qdora", True), ("peft qlora", False)):
        peer_model = peft_model(dense, settings, config.adapter, dora=dora, compute=dtype)
        arms[name] = peer_step(peer_model, config.training, batch, device, dtype)
    del dense, model, peer_model
    seconds = alternate(arms, rounds, warmup=3, title="training step")
    qdora_step = arms["qdora"]
    arms.clear()  # and with them the other models' memory
    return {
        "batch": list(batch.input_ids_BT.shape),
        "labels": len(batch.targets_N),
        "seconds": medians(seconds),
        "ratios": ratios(seconds, PAIRS),
        "gemm": _gemm_share(qdora_step, flops["qdora"], dtype, device, rounds),
    }


def _load(settings: ModelConfig, device: torch.device, adapter: AdapterConfig | None) -> PreTrainedModel:
    """The model as training loads it."""
    checkpoint = open_checkpoint(settings.path, settings.revision)
    context = DistributedContext(device=device)
    model, _ = load_model(
        checkpoint, settings, context, lambda m: None if adapter is None else inject(m, adapter)
    )
    return model


def _gemm_share(
    step: Arm, flops: int, dtype: torch.dtype, device: torch.device, rounds: int
) -> dict[str, float]:
    """The rate of a step's necessary flops against that of a large product, round by round."""
    product, product_flops = square_product(dtype, device)
    seconds = alternate({"step": step, "product": product}, rounds, warmup=3, title="share of products")
    median = medians(seconds)
    return {
        "machine_flops_per_second": product_flops / median["product"],
        "step_flops": flops,
        "step_seconds": median["step"],
        "share": flops / product_flops * ratio(seconds, "product", "step"),
    }


def necessary_flops(model: PreTrainedModel, batch: Batch) -> int:
    """Flops of the products that a step cannot do without, a multiply and an add counted as two.

    W x and Wᵀ v of each layer, the six products with A and B, W Aᵀ for the norm, causal attention (half
    of its square) and the output layer where there are labels.
    """
    b, t = batch.input_ids_BT.shape
    labels = len(batch.targets_N)
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


def our_step(model: PreTrainedModel, training: TrainingConfig, batch: Batch, device: torch.device) -> Arm:
    """A step of our model as training takes it, on one batch."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = AdapterOptimizer(parameters, training)
    own = batch.to(device)

    def step() -> None:
        optimizer.zero_grad()
        with training_attention(model):
            completion_loss(model, own).backward()
        nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step(training.learning_rate)

    return lambda: timed(step, device)


def peer_step(
    model: nn.Module, training: TrainingConfig, batch: Batch, device: torch.device, compute: torch.dtype
) -> Arm:
    """As PEFT's users train: the model's own loss, torch's AdamW on float32 adapters, bf16 by autocast."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=training.learning_rate, fused=True)
    own = batch.to(device)
    ids_BT = own.input_ids_BT
    labels_BT = torch.full_like(ids_BT, -100)  # what torch's cross entropy leaves out
    labels_BT.view(-1)[own.labelled_N + 1] = own.targets_N

    def step() -> None:
        optimizer.zero_grad()
        with autocast(device, compute):
            loss = model(input_ids=ids_BT, labels=labels_BT, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return lambda: timed(step, device)
