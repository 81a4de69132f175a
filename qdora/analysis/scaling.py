"""How far sharded training scales on paper: the time of its products against that of its collectives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only; no display is needed

import matplotlib.pyplot as plt

from qdora.analysis.communication import Traffic, traffic, work
from qdora.analysis.memory_depth import Architecture
from qdora.analysis.memory_step import Launch
from qdora.config import AdapterConfig
from qdora.files import write_file
from qdora.parallel.launch_settings import FsdpSettings

RANKS = (2, 8, 64, 1024)
NODE = 8
"""GPUs of one node."""
BASE_SECONDS = 8.4e-6
"""Of a collective, before its first hop (NVIDIA/nccl, src/graph/tuning.cc, ring, Simple protocol)."""
PEAK_FLOPS = 312e12
"""An A100's dense bfloat16 products (NVIDIA A100 datasheet)."""
UTILIZATION = 0.4
"""Share of the peak that products are supposed to reach; every ratio is inverse to it."""


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
    # 600 GB/s in both directions together (NVIDIA A100 datasheet).
    Link("NVLink 3", 300e9, 3.4e-6, 9.6e-6),
    # 200 Gb/s, a port for every GPU (NVIDIA DGX A100 datasheet).
    Link("InfiniBand HDR", 25e9, 3.4e-6, 9.6e-6),
)


@dataclass(frozen=True)
class Scheme:
    """A way of training to compare: what is stored, what is trained."""

    name: str
    architecture: Architecture
    launch: Launch


def schemes(architecture: Architecture, launch: Launch) -> list[Scheme]:
    """The launch as it is, the same adapter on a 16-bit base, and the 16-bit model trained as a whole.

    All with the same tokens a GPU, sharded.
    """
    launch = replace(launch, fsdp=launch.fsdp or FsdpSettings())
    dense = replace(architecture, quantization=None)
    method = launch.adapter.method.removeprefix("q") if architecture.quantization else launch.adapter.method
    adapter = launch.adapter.model_copy(update={"method": method})
    full = AdapterConfig(method="full")
    return [
        Scheme(
            "4-bit base + adapter" if architecture.quantization else "as configured", architecture, launch
        ),
        Scheme("16-bit base + adapter", dense, replace(launch, adapter=adapter)),
        Scheme("16-bit, all trained", dense, replace(launch, adapter=full)),
    ]


def at_ranks(launch: Launch, ranks: int) -> Launch:
    """The same tokens a GPU on so many GPUs: a larger batch."""
    training = launch.training
    own = training.batch_size // launch.processes
    return replace(launch, processes=ranks, training=training.model_copy(update={"batch_size": own * ranks}))


def collective_seconds(moved: Traffic, link: Link) -> float:
    """Of a step: what one rank sends at the link's rate, and a hop to every other rank each time."""
    nodes = -(-moved.ranks // NODE)
    hops = (moved.ranks - nodes) * link.hop + (nodes - 1) * link.between
    return moved.sent / link.rate + moved.collectives * (BASE_SECONDS + hops)


def product_seconds(scheme: Scheme) -> float:
    """Of a step of one rank."""
    micro_batches = scheme.launch.training.gradient_accumulation
    return micro_batches * work(scheme.architecture, scheme.launch).total / (PEAK_FLOPS * UTILIZATION)


@dataclass(frozen=True)
class Point:
    """One scheme on so many ranks.

    Attributes:
        ratios: time of the products over time of the collectives, by link; below 1 the link decides.
        efficiency: share of the time in which products run, by link, where everything overlaps.
    """

    scheme: str
    moved: Traffic
    ratios: Mapping[str, float]

    @property
    def efficiency(self) -> dict[str, float]:
        return {link: min(1.0, ratio) for link, ratio in self.ratios.items()}


def scale(architecture: Architecture, launch: Launch, ranks: Sequence[int] = RANKS) -> list[Point]:
    """Every scheme at every number of ranks.

    Raises: InputError: the adapter does not fit the model.
    """
    points = []
    for scheme in schemes(architecture, launch):
        products = product_seconds(scheme)
        for count in ranks:
            moved = traffic(architecture=scheme.architecture, launch=at_ranks(scheme.launch, count))
            ratios = {link.name: products / collective_seconds(moved, link) for link in LINKS}
            points.append(Point(scheme.name, moved, ratios))
    return points


def plot_efficiency(points: Sequence[Point], path: Path, title: str) -> None:
    """Share of the time in which products run over the number of ranks, one panel a link.

    Args:
        path: PNG to write.
        title: above the panels.
    """
    figure, panels = plt.subplots(1, len(LINKS), figsize=(11, 3.6), dpi=130, sharey=True)
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
    figure.tight_layout()
    write_file(path, lambda temporary: figure.savefig(temporary, format="png"))
    plt.close(figure)
