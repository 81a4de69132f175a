"""`estimate`: what a run takes on each GPU, before there is a GPU or a weight."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from qdora.adapters.base import describe
from qdora.config import RunConfig
from qdora.distributed.launch import FsdpSettings, read_launch_file
from qdora.errors import InputError
from qdora.files import write_json
from qdora.planner.advise import advise
from qdora.planner.architecture import Architecture, find_architecture
from qdora.planner.report import Breakdown, Estimate
from qdora.planner.scaling import LINKS, Point, Traffic, plot_efficiency, scale, traffic
from qdora.planner.shorten import estimate
from qdora.planner.simulate import Launch
from qdora.resources import show_size
from qdora.training.layers import check_layer_settings


def run(
    arguments: argparse.Namespace,
    config: RunConfig,
    memory: int | None,
    reserve: int,
    plot: Path | None,
    figures: Path | None,
) -> None:
    """Estimate and print.

    Args:
        arguments: of the command.
        config: of the run.
        memory: bytes of one GPU; None where it was not asked whether the run fits.
        reserve: bytes set aside on it.
        plot, figures: PNG and JSON file to write.
    """
    launch = _launch(arguments, config)
    architecture = find_architecture(config.model, arguments.architecture, launch.device)
    if launch.device == "cpu":
        reserve = 0
    result = estimate(architecture, launch)
    moved = traffic(architecture, launch)
    headline = _headline(arguments.architecture or config.model.path, architecture, launch)
    print(headline)
    print(_parts(result))
    print(_around(result, moved, launch))
    tree = _tree(launch, result, moved)
    if memory is not None:
        tree["proposals"] = _verdict(architecture, launch, result, memory, reserve)
        tree |= {"memory": memory, "reserve": reserve, "fits": result.peak.total <= memory - reserve}
    if arguments.scaling:
        points = scale(architecture, launch)
        print(_scaling(points, launch))
        tree["scaling"] = [
            {"scheme": p.scheme, "ranks": p.moved.ranks, "sent_bytes": p.moved.sent, "ratios": dict(p.ratios)}
            for p in points
        ]
        if plot is not None:
            plot_efficiency(points, plot, headline)
    if figures is not None:
        write_json(figures, tree)


def _launch(arguments: argparse.Namespace, config: RunConfig) -> Launch:
    file = None if arguments.accelerate_config is None else read_launch_file(arguments.accelerate_config)
    world_size = arguments.gpus if arguments.gpus is not None else file.world_size if file else 1
    if world_size < 1:
        raise InputError(f"--gpus {world_size}; allowed: 1 or more")
    launch = Launch(
        adapter=config.adapter,
        training=config.training,
        max_length=config.data.max_length,
        world_size=world_size,
        fsdp=file.fsdp if file else FsdpSettings() if world_size > 1 else None,
        device=arguments.device or (file.device if file else "cuda"),
        packing=config.data.packing,
    )
    # It is the uncompiled step that is estimated, with or without a compiler here.
    eager = config.training.model_copy(update={"compile": False})
    check_layer_settings(eager, torch.device(launch.device))
    _ = launch.micro_batch_size  # refuses a batch that does not divide, before anything is built
    return launch


def _headline(model: str, architecture: Architecture, launch: Launch) -> str:
    dtype = str(architecture.compute).removeprefix("torch.")
    places = {"cuda": ("GPU", "GPUs"), "cpu": ("process", "processes")}[launch.device]
    axes = describe(architecture.quantization.name, launch.adapter, launch.training.mode)
    axes += "" if launch.adapter.type == "none" else f", r {launch.adapter.r}"
    return (
        f"{model}, {axes}, {dtype}, "
        f"{launch.world_size} {places[launch.world_size > 1]}, {_sharding(launch)}; "
        f"{launch.micro_batch_size} x {launch.max_length} tokens at once"
    )


def _sharding(launch: Launch) -> str:
    if launch.fsdp is None:
        return "each with the whole model"
    kept = "" if launch.fsdp.reshard_after_forward else ", gathered layers kept"
    return f"FSDP{kept}{', parameters offloaded' if launch.fsdp.offload else ''}"


def _parts(result: Estimate) -> str:
    rows = [
        (part.value, f"{size / 2**30:.3f}", f"{100 * size / result.peak.total:.1f}")
        for part, size in result.peak.items()
    ]
    rows.append(("total", f"{result.peak.total / 2**30:.3f}", "100.0"))
    headers, aligned = ["at the peak", "GiB", "%"], ("left", "right", "right")
    return "\n" + tabulate(rows, headers=headers, colalign=aligned, disable_numparse=True)


def _around(result: Estimate, moved: Traffic, launch: Launch) -> str:
    rows = [("the peak is in", _moment(result.moment)), ("between steps", show_size(result.at_rest.total))]
    if result.host.total:
        rows.append(("in CPU memory", f"{show_size(result.host.total)} a process"))
    if launch.world_size > 1:
        rows.append(("sent in a step", f"{show_size(int(moved.sent))} by each, and received"))
    return "\n" + tabulate(rows, tablefmt="plain")


_SPOKEN = {
    "layer -1,": "the last layer,",
    "layer -2,": "the last layer but one,",
    "layer 0,": "the first layer,",
    "micro-batch 0": "first micro-batch",
    "micro-batch 1": "a later micro-batch",
}


def _moment(phase: str) -> str:
    """A phase of a step, as it is printed: `backward of layer -1, micro-batch 1`."""
    for part, spoken in _SPOKEN.items():
        phase = phase.replace(part, spoken)
    return phase


def _verdict(
    architecture: Architecture, launch: Launch, result: Estimate, memory: int, reserve: int
) -> list[dict[str, Any]]:
    """Say whether it fits; where not, what to change."""
    left = memory - reserve - result.peak.total
    aside = f" ({show_size(reserve)} set aside)" if reserve else ""
    if left >= 0:
        print(f"\nfits in {show_size(memory)}{aside}: {show_size(left)} left")
        return []
    print(f"\ndoes not fit in {show_size(memory)}{aside}: {show_size(-left)} too much", flush=True)
    print("estimating what would change that ...", file=sys.stderr)
    proposals = list(advise(architecture, launch, result, memory - reserve))
    rows = [
        (
            p.change.settings,
            f"{p.estimate.peak.total / 2**30:.2f}",
            "yes" if p.fits else "no",
            p.change.price if p.change.same_run else f"another run: {p.change.price}",
        )
        for p in proposals
    ]
    print("\n" + tabulate(rows, headers=["--set", "GiB", "fits", "price"], disable_numparse=True))
    if not any(p.fits for p in proposals):
        print("\nnothing here is enough: take GPUs with more memory, or a smaller model")
    return [
        {
            "set": p.change.settings,
            "same_run": p.change.same_run,
            "fits": p.fits,
            "peak": _bytes(p.estimate.peak),
        }
        for p in proposals
    ]


def _scaling(points: list[Point], launch: Launch) -> str:
    rows = [
        (p.scheme, p.moved.ranks, f"{p.moved.sent / 1e9:.2f}", *(f"{p.ratios[x.name]:.2f}" for x in LINKS))
        for p in points
    ]
    headers = ["scheme", "GPUs", "GB sent by each", *(link.name for link in LINKS)]
    aligned = ("left", *["right"] * (2 + len(LINKS)))
    tokens = launch.micro_batch_size * launch.max_length * launch.training.gradient_accumulation
    return (
        f"\nA step of {tokens} tokens on each GPU: bytes, and time of products over time of collectives\n\n"
        + tabulate(rows, headers=headers, disable_numparse=True, colalign=aligned)
    )


def _tree(launch: Launch, result: Estimate, moved: Traffic) -> dict[str, Any]:
    return {
        "world_size": launch.world_size,
        "micro_batch": [launch.micro_batch_size, launch.max_length],
        "peak": _bytes(result.peak),
        "moment": result.moment,
        "between_steps": _bytes(result.at_rest),
        "cpu_memory": _bytes(result.host),
        "sent_bytes": moved.sent,
        "collectives": dict(result.exchanged),
    }


def _bytes(breakdown: Breakdown) -> dict[str, int]:
    return {**{part.value: size for part, size in breakdown.items()}, "total": breakdown.total}
