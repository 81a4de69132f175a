"""Training steps of our arms and PEFT's on random models: times, and what the device does in one."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from qdora.benchmark.gpu.models import COMPUTE, Shared, peft_random_model, random_batch, random_model
from qdora.benchmark.gpu.run import Figures, Setup, attempt
from qdora.benchmark.peers import Arm, alternate
from qdora.benchmark.step import our_step, peer_step
from qdora.config import QuantizationName, TrainingConfig

ARMS = ("qdora", "qlora", "peft qlora", "peft qdora", "lora bf16")
"""The last one is the floor: dense bf16 weights, no magnitude."""
PAIRS = (("qdora", "peft qlora"), ("qdora", "peft qdora"), ("qdora", "qlora"), ("qdora", "lora bf16"))
TRAINING = TrainingConfig(max_steps=1)
TOP = 15
"""Kernels that the profile lists."""


def steps(setup: Setup, figures: Figures) -> None:
    """Times of a step of the full model, from two shallow ones: what a layer adds, and the rest.

    All arms at both depths stand in memory, so that each round takes all of them one after the other.
    """
    models: dict[tuple[str, int], Any] = {}
    shared: Shared = {}
    for arm in ARMS:
        for depth in setup.size.depths:
            setup.clock.check()
            with attempt(figures, f"{arm}, {depth} layers"):
                models[arm, depth] = _build(setup, arm, depth, shared)
    times: list[dict[str, Any]] = []
    ratios: list[dict[str, Any]] = []
    figures |= {"steps": times, "ratios": ratios}
    for sequences, tokens in setup.size.batches:
        for checkpointing in (False, True):
            setup.clock.check()
            case = {"batch": f"{sequences}x{tokens}", "checkpointing": checkpointing}
            seconds = _full_steps(setup, figures, models, sequences, tokens, checkpointing)
            for arm, rounds in seconds.items():
                median = statistics.median(rounds)
                rate = {"tokens/s": sequences * tokens / median}
                times.append(case | {"arm": arm, "ms": 1e3 * median} | rate)
            for arm, peer in PAIRS:
                if arm in seconds and peer in seconds:
                    by_round = [a / b for a, b in zip(seconds[arm], seconds[peer], strict=True)]
                    spread = {"least": min(by_round), "greatest": max(by_round)}
                    ratios.append(
                        case | {"arm": arm, "peer": peer, "ratio": statistics.median(by_round)} | spread
                    )


def _build(setup: Setup, arm: str, depth: int, shared: Shared) -> Any:
    config, dora = setup.size.config(depth), "qdora" in arm
    if "peft" in arm:
        return peft_random_model(config, setup.device, dora=dora, shared=shared)
    quantization: QuantizationName = "none" if "bf16" in arm else "nf4"
    return random_model(config, setup.device, dora=dora, quantization=quantization, shared=shared)


def _full_steps(
    setup: Setup,
    figures: Figures,
    models: dict[tuple[str, int], Any],
    sequences: int,
    tokens: int,
    checkpointing: bool,
) -> dict[str, list[float]]:
    """Seconds of the full model's step of each round, by arm; an arm that fails is left out."""
    batch = random_batch(setup.size.config(), sequences, tokens)
    working: dict[str, Arm] = {}
    for (arm, depth), model in models.items():
        setup.clock.check()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        else:
            model.activation_checkpointing_disable()
        step = (
            peer_step(model, TRAINING, batch, setup.device, COMPUTE)
            if "peft" in arm
            else our_step(model, TRAINING, batch, setup.device)
        )
        with attempt(figures, f"{arm}, {depth} layers, {sequences}x{tokens}, checkpointing {checkpointing}"):
            step()
            working[f"{arm}/{depth}"] = step
    seconds = alternate(working, setup.size.rounds, warmup=1, title=f"{sequences}x{tokens}")
    low, high = setup.size.depths
    more = (setup.size.layers - low) / (high - low)
    return {
        arm: [
            a + more * (b - a) for a, b in zip(seconds[f"{arm}/{low}"], seconds[f"{arm}/{high}"], strict=True)
        ]
        for arm in ARMS
        if f"{arm}/{low}" in seconds and f"{arm}/{high}" in seconds
    }


def profile_step(setup: Setup, figures: Figures) -> None:
    """One QDoRA step of the full model: how long the device works, and on what.

    Busy time is held against the wall time of steps without the profiler, which slows the host.
    """
    (sequences, tokens), config = setup.size.batches[0], setup.size.config()
    model = random_model(config, setup.device, dora=True)
    step = our_step(model, TRAINING, random_batch(config, sequences, tokens), setup.device)
    seconds = [step() for _ in range(2 + setup.size.rounds)][2:]
    setup.clock.check()
    on_device = setup.device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_device else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        profiled = step()
    events = [e for e in profiler.events() or [] if _is_work(e, on_device)]
    if not events:
        raise RuntimeError("the profiler has recorded nothing on the device")
    busy = _busy_seconds(events)
    figures |= {
        "batch": f"{sequences}x{tokens}",
        "wall, s": statistics.median(seconds),
        "wall under the profiler, s": profiled,
        "busy, s": busy,
        "busy / wall": busy / statistics.median(seconds),
        "launches": len(events),
        "top": _top(events),
    }


def _is_work(event: FunctionEvent, on_device: bool) -> bool:
    if on_device:
        annotation = getattr(event, "is_user_annotation", False)
        return event.device_type.name == "CUDA" and not annotation
    return True


def _busy_seconds(events: Iterable[FunctionEvent]) -> float:
    """The union of the events' intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted((e.time_range.start, e.time_range.end) for e in events):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total / 1e6


def _top(events: Iterable[FunctionEvent]) -> list[dict[str, Any]]:
    spent: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in events:
        spent[event.name] += event.time_range.elapsed_us()
        calls[event.name] += 1
    return [
        {"kernel": name[:90], "calls": calls[name], "ms": us / 1e3} for name, us in spent.most_common(TOP)
    ]
