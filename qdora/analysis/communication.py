"""The bytes that a training step moves between ranks, and the arithmetic that it hides them behind.

A rank sends (N - 1)/N of what a gather or a scatter holds for all N ranks, and twice that of what is
summed; it receives as much.  Each of its micro-batches

    gathers every decoder layer in forward, and again in backward where it was freed after forward;
    gathers an untied embedding and an untied output layer, or the tied one, once;
    scatters the float32 gradients of the trained parameters.

Frozen weights travel as they are stored, 4-bit ones with their scales, and never back: they have no gradient.

Source: PyTorch FSDP, arXiv:2304.11277 §3; ZeRO, arXiv:1910.02054 §7; for the factors, NVIDIA/nccl-tests,
doc/PERFORMANCE.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from qdora.adapters.inject import inject
from qdora.analysis.memory_depth import Architecture
from qdora.analysis.memory_model import decoder_layers
from qdora.analysis.memory_step import Launch
from qdora.quant.nf4 import NF4Weight

GRADIENT_BYTES = 4
"""Gradients are summed in float32."""


@dataclass(frozen=True)
class Traffic:
    """Bytes of all ranks' shares together that one optimizer step moves, by what is done with them.

    Attributes:
        ranks: N.
        gathered: by all-gathers.
        scattered: by reduce-scatters.
        summed: by all-reduces; a few numbers for the loss and the gradient norm come on top.
        collectives: how often all ranks meet.
    """

    ranks: int
    gathered: int
    scattered: int
    summed: int
    collectives: int

    @property
    def sent(self) -> float:
        """Bytes that one rank sends, and receives."""
        return (self.gathered + self.scattered + 2 * self.summed) * (self.ranks - 1) / self.ranks


def traffic(architecture: Architecture, launch: Launch) -> Traffic:
    """Of one optimizer step of a run.

    Raises: InputError: the adapter does not fit the model.
    """
    model = architecture.skeleton()
    inject(model, launch.adapter)
    count, micro_batches = launch.processes, launch.training.gradient_accumulation
    trained = [p for p in model.parameters() if p.requires_grad]
    if launch.fsdp is None:
        gradients = sum(p.numel() for p in trained) * GRADIENT_BYTES if count > 1 else 0
        return Traffic(count, 0, 0, gradients, int(count > 1))
    layers = _unique(p for layer in decoder_layers(model) for p in layer.parameters())
    inside = {id(p) for p in layers}
    once = [p for p in model.parameters() if id(p) not in inside]
    statistics = {id(m.absmax) for m in model.modules() if isinstance(m, NF4Weight)}
    passes = 2 if launch.fsdp.reshard_after_forward and launch.fsdp.wrap else 1
    gathered = passes * _gathered(layers, count, statistics) + _gathered(once, count, statistics)
    scattered = sum(_padded(p, count) for p in trained) * GRADIENT_BYTES
    groups = len(decoder_layers(model)) if launch.fsdp.wrap else 0
    meetings = groups * (passes + 1) + (2 if once and launch.fsdp.wrap else 1)
    return Traffic(count, micro_batches * gathered, micro_batches * scattered, 0, micro_batches * meetings)


@dataclass(frozen=True)
class Work:
    """Multiplications and additions of one micro-batch on one rank.

    Attributes:
        forward: of the decoder's and the output layer's products, adapters and attention.
        backward: the same for the gradients, and for what is computed again.
    """

    forward: float
    backward: float

    @property
    def total(self) -> float:
        """Of both."""
        return self.forward + self.backward


def work(architecture: Architecture, launch: Launch) -> Work:
    """Of one micro-batch of examples of the greatest length.

    A product costs 2 operations a weight and token.  Frozen weights have the gradient of their input only,
    trained ones both.  Attention is causal: half of the scores.

    Raises: InputError: the adapter does not fit the model.
    """
    model = architecture.skeleton()
    inject(model, launch.adapter)
    tokens = launch.micro_batch_size * launch.max_length
    frozen, trained = _products(model)
    text = architecture.config.get_text_config()
    head = text.hidden_size * text.vocab_size
    # Scores and their sum over values: 2 products of T x hidden a token, half of them behind the mask.
    attention = text.num_hidden_layers * 2 * text.hidden_size * launch.max_length
    inside = tokens * (2 * frozen + 2 * trained + attention)
    again = inside if launch.checkpointing else 0
    head_work = tokens * 2 * head
    back = tokens * (2 * frozen + 4 * trained + 2 * attention) + head_work
    return Work(inside + head_work, back + again)


def _products(model: PreTrainedModel) -> tuple[int, int]:
    """Weights of the decoder's linear layers, frozen and trained."""
    frozen = trained = 0
    for layer in decoder_layers(model):
        for module in layer.modules():
            if isinstance(module, NF4Weight):
                frozen += module.out_features * module.in_features
                continue
            for parameter in module.parameters(recurse=False):
                if parameter.dim() > 1:
                    frozen += 0 if parameter.requires_grad else parameter.numel()
                    trained += parameter.numel() if parameter.requires_grad else 0
    return frozen, trained


def _gathered(parameters: Iterable[nn.Parameter], count: int, statistics: set[int]) -> int:
    """Bytes on the way; frozen vectors that are no statistics are whole on every rank."""
    sharded = [p for p in parameters if p.requires_grad or p.dim() > 1 or id(p) in statistics]
    return sum(_padded(p, count) * p.dtype.itemsize for p in sharded)


def _padded(parameter: nn.Parameter, count: int) -> int:
    """Numbers of all shares, each filled up to the size of the largest."""
    rows = -(-parameter.shape[0] // count) * count
    return rows * (parameter.numel() // parameter.shape[0])


def _unique(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return list(dict.fromkeys(parameters))
