"""The bytes that a training step moves between ranks, and the arithmetic that it hides them behind.

A rank sends (N - 1)/N of what an all-gather or a reduce-scatter holds for all N ranks, and twice that of an
all-reduce; it receives as much.  Each of its micro-batches

    gathers every decoder layer in forward, and again in backward where it was freed after forward;
    gathers an untied embedding and an untied output layer, or the tied one, once;
    scatters the float32 gradients of the trained parameters.

Frozen weights travel as they are stored, quantized ones with their scales, and never back: they have no
gradient.

Source: PyTorch FSDP, arXiv:2304.11277 §3; ZeRO, arXiv:1910.02054 §7; for the factors, NVIDIA/nccl-tests,
doc/PERFORMANCE.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from qdora.config import AdapterConfig
from qdora.distributed.fsdp import frozen_vectors
from qdora.distributed.launch import FsdpSettings
from qdora.files import write_file
from qdora.planner.architecture import Architecture
from qdora.planner.simulate import Launch, adapted_model
from qdora.quant import Quantization
from qdora.quant.base import FrozenWeight
from qdora.training.layers import decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GRADIENT_BYTES = 4
"""Gradients are summed in float32."""
RANKS = (2, 8, 64, 1024)
NODE = 8
"""GPUs of one node."""
BASE_SECONDS = 8.4e-6
"""Of a collective, before its first hop (NVIDIA/nccl, src/graph/tuning.cc, ring, Simple protocol)."""
PEAK_FLOPS = 312e12
"""An A100's dense bfloat16 products (NVIDIA A100 datasheet)."""
UTILIZATION = 0.4
"""Fraction of the peak that products are supposed to reach; every ratio is inverse to it."""


@dataclass(frozen=True)
class Traffic:
    """Bytes of all ranks' shards that one optimizer step moves, by what is done with them.

    Attributes:
        ranks: N.
        gathered: by all-gathers.
        scattered: by reduce-scatters.
        summed: by all-reduces; a few numbers for the loss and the gradient norm come on top.
        collectives: how many.
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
    model = adapted_model(architecture, launch)
    ranks, micro_batches = launch.world_size, launch.training.gradient_accumulation
    trained = [p for p in model.parameters() if p.requires_grad]
    if launch.fsdp is None:
        gradients = sum(p.numel() for p in trained) * GRADIENT_BYTES if ranks > 1 else 0
        return Traffic(ranks, 0, 0, gradients, int(ranks > 1))
    layers = decoder_layers(model)
    replicated = set(frozen_vectors(model))
    inside = {p for layer in layers for p in layer.parameters()} - replicated
    outside = set(model.parameters()) - inside - replicated
    passes = 2 if launch.fsdp.reshard_after_forward and launch.fsdp.wrap else 1
    gathered = passes * _gathered(inside, ranks) + _gathered(outside, ranks)
    scattered = sum(_padded(p, ranks) for p in trained) * GRADIENT_BYTES
    groups = len(layers) if launch.fsdp.wrap else 0
    collectives = groups * (passes + 1) + (2 if outside and launch.fsdp.wrap else 1)
    return Traffic(ranks, micro_batches * gathered, micro_batches * scattered, 0, micro_batches * collectives)


def _gathered(parameters: Iterable[nn.Parameter], ranks: int) -> int:
    """Bytes of an all-gather."""
    return sum(_padded(p, ranks) * p.dtype.itemsize for p in parameters)


def _padded(parameter: nn.Parameter, ranks: int) -> int:
    """Numbers in the shards of all ranks, each padded to the size of the largest."""
    rows = -(-parameter.shape[0] // ranks) * ranks
    return rows * (parameter.numel() // parameter.shape[0])


def work(architecture: Architecture, launch: Launch) -> tuple[int, int]:
    """Multiplications and additions of one rank for a micro-batch of the longest examples.

    A product costs 2 operations a weight and token.  Frozen weights have the gradient of their input only,
    trained ones both.  Attention is causal: half of the scores.

    Returns: those of forward (products of the decoder and the output layer, adapters, attention), and those
        of backward, with what is computed again.
    Raises: InputError: the adapter does not fit the model.
    """
    tokens = launch.micro_batch_size * launch.max_length
    frozen, trained = _products(adapted_model(architecture, launch))
    text = architecture.config.get_text_config()
    head = text.hidden_size * text.vocab_size
    # Scores and their sum over values: 2 products of T x hidden a token, half of them behind the mask.
    attention = text.num_hidden_layers * 2 * text.hidden_size * launch.max_length
    inside = tokens * (2 * frozen + 2 * trained + attention)
    again = inside if launch.checkpointing else 0
    head_work = tokens * 2 * head
    back = tokens * (2 * frozen + 4 * trained + 2 * attention) + head_work
    return inside + head_work, back + again


def _products(model: PreTrainedModel) -> tuple[int, int]:
    """Weights of the decoder's linear layers, frozen and trained."""
    frozen = trained = 0
    for module in (module for layer in decoder_layers(model) for module in layer.modules()):
        if isinstance(module, FrozenWeight) and module.trained is None:
            frozen += module.logical_parameters
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.dim() > 1:
                frozen += 0 if parameter.requires_grad else parameter.numel()
                trained += parameter.numel() if parameter.requires_grad else 0
    return frozen, trained


@dataclass(frozen=True)
class Link:
    """What the slowest hop of a ring goes over.

    Attributes:
        rate: bytes a second of one GPU in one direction.
        hop: seconds of latency of a hop inside a node.
        between: the same between nodes.
    """

    name: str
    rate: float
    hop: float
    between: float


# Latencies: NVIDIA/nccl, src/graph/tuning.cc, ring, Simple protocol: PCI 5.7, NVLink 3.4, network 9.6 µs.
LINKS = (
    # 16 lanes of 16 GT/s, 128 bits in 130 (PCI Express Base 4.0).
    Link("PCIe 4.0 x16", 31.5e9, 5.7e-6, 9.6e-6),
    # 600 GB/s in both directions (NVIDIA A100 datasheet).
    Link("NVLink 3", 300e9, 3.4e-6, 9.6e-6),
    # 200 Gb/s, a port for every GPU (NVIDIA DGX A100 datasheet).
    Link("InfiniBand HDR", 25e9, 3.4e-6, 9.6e-6),
)


def schemes(architecture: Architecture, launch: Launch) -> dict[str, tuple[Architecture, Launch]]:
    """The launch as it is, the same adapter on a 16-bit base, and every weight of the 16-bit model trained.

    All with the same tokens a GPU, sharded; by the name that tables and plots show.
    """
    launch = replace(launch, fsdp=launch.fsdp or FsdpSettings())
    dense = replace(architecture, quantization=Quantization("none"))
    quantized = architecture.quantization.name != "none"
    full = replace(launch.with_training(mode="full"), adapter=AdapterConfig(type="none", dora=False))
    name = f"{_bits(architecture.quantization)}-bit base + adapter" if quantized else "as configured"
    return {
        name: (architecture, launch),
        "16-bit base + adapter": (dense, launch),
        "16-bit, all trained": (dense, full),
    }


def _bits(quantization: Quantization) -> int:
    """Bits of a weight, statistics apart."""
    weight = quantization.on_meta((64, 64), torch.bfloat16)
    parameters = [p for name, p in weight.named_parameters() if not weight.is_statistic(name)]
    return 8 * sum(p.numel() * p.itemsize for p in parameters) // weight.logical_parameters


def at_ranks(launch: Launch, ranks: int) -> Launch:
    """The same tokens a GPU on so many GPUs: a larger batch."""
    batch_size = launch.training.batch_size // launch.world_size * ranks
    return replace(launch.with_training(batch_size=batch_size), world_size=ranks)


def collective_seconds(moved: Traffic, link: Link) -> float:
    """Of a step: what one rank sends at the link's rate, and a hop to every other rank each time."""
    nodes = -(-moved.ranks // NODE)
    hops = (moved.ranks - nodes) * link.hop + (nodes - 1) * link.between
    return moved.sent / link.rate + moved.collectives * (BASE_SECONDS + hops)


@dataclass(frozen=True)
class Point:
    """One scheme on so many ranks.

    Attributes:
        ratios: time of the products over time of the collectives, by link; below 1 the link decides.
    """

    scheme: str
    moved: Traffic
    ratios: Mapping[str, float]

    @property
    def efficiency(self) -> dict[str, float]:
        """Fraction of the time in which products run, by link, where everything overlaps."""
        return {link: min(1.0, ratio) for link, ratio in self.ratios.items()}


def scale(architecture: Architecture, launch: Launch, ranks: Sequence[int] = RANKS) -> list[Point]:
    """Every scheme at every number of ranks.

    Raises: InputError: the adapter does not fit the model.
    """
    points = []
    for name, (model, run) in schemes(architecture, launch).items():
        operations = run.training.gradient_accumulation * sum(work(model, run))
        products = operations / (PEAK_FLOPS * UTILIZATION)
        for count in ranks:
            moved = traffic(model, at_ranks(run, count))
            ratios = {link.name: products / collective_seconds(moved, link) for link in LINKS}
            points.append(Point(name, moved, ratios))
    return points


def plot_efficiency(points: Sequence[Point], path: Path, title: str) -> None:
    """Fraction of the time in which products run over the number of ranks, one panel a link.

    Args:
        path: PNG to write.
        title: above the panels.
    """
    from matplotlib.figure import Figure  # half a second

    figure = Figure(figsize=(11, 3.6), dpi=130, layout="tight")
    panels = figure.subplots(1, len(LINKS), sharey=True)
    ranks = sorted({point.moved.ranks for point in points})
    for axes, link in zip(panels, LINKS, strict=True):
        for name in dict.fromkeys(point.scheme for point in points):
            own = [point for point in points if point.scheme == name]
            x = [point.moved.ranks for point in own]
            axes.plot(x, [100 * p.efficiency[link.name] for p in own], marker="o", ms=3, label=name)
        axes.set_xscale("log")
        axes.set_xticks(ranks, [str(count) for count in ranks])
        axes.minorticks_off()
        axes.set_title(f"{link.name}, {link.rate / 1e9:g} GB/s", fontsize=10)
        axes.set_xlabel("GPUs")
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("time spent in products (%),\nall else hidden behind them")
    panels[0].set_ylim(0, 105)
    panels[-1].legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=11)
    write_file(path, lambda temporary: figure.savefig(temporary, format="png"))
