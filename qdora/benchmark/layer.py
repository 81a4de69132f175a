"""Forward and backward of one adapted layer, ours and PEFT's."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from qdora.adapters.layer import AdaptedLinear
from qdora.adapters.lora import LoraUpdate
from qdora.benchmark.measure import alternate, ratio, timed
from qdora.benchmark.peers import peft_layer
from qdora.config import AdapterConfig


@dataclass(frozen=True)
class Shape:
    """A layer and its input: (tokens, in_features) times (out_features, in_features)."""

    out_features: int
    in_features: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.out_features}x{self.in_features}, {self.tokens} tokens"


LARGE = (Shape(4096, 4096, 256), Shape(11008, 4096, 256), Shape(4096, 11008, 256))
"""LLaMA-7B's."""
SMALL = (Shape(576, 576, 512), Shape(1536, 576, 512), Shape(576, 1536, 512))
"""SmolLM2-135M's."""

ARMS = ("qdora", "qlora", "peft qdora", "peft qlora")


def goals(shape: Shape) -> dict[tuple[str, str], float]:
    """The largest ratios that are wanted, on two CPU cores in float32."""
    large = shape.out_features * shape.in_features >= 4096 * 4096
    return {
        ("qdora", "peft qdora"): 0.58 if large else 0.85,
        ("qdora", "peft qlora"): 1.00,
        ("qdora", "qlora"): 1.05,
    }


def benchmark_layer(
    shape: Shape, config: AdapterConfig, dtype: torch.dtype, device: torch.device, rounds: int
) -> dict[str, Any]:
    """Medians in milliseconds and the ratios that count, for one shape.

    Each pass follows a change of B, as in training with one micro-batch a step: every norm is
    computed anew.
    """
    generator = torch.Generator().manual_seed(0)
    w_OI = (torch.randn(shape.out_features, shape.in_features, generator=generator) * 0.02).to(device)
    x = torch.randn(1, shape.tokens, shape.in_features, generator=generator).to(device, dtype)
    g = torch.randn(1, shape.tokens, shape.out_features, generator=generator).to(device, dtype)
    layers = {
        "qdora": _ours(w_OI, config, dora=True),
        "qlora": _ours(w_OI, config, dora=False),
        "peft qdora": peft_layer(w_OI, config, dora=True, compute=dtype),
        "peft qlora": peft_layer(w_OI, config, dora=False, compute=dtype),
    }
    seconds = alternate(
        {name: _pass(layer, x, g, device) for name, layer in layers.items()}, rounds, title=str(shape)
    )
    return {
        "shape": asdict(shape),
        "milliseconds": {name: 1e3 * statistics.median(values) for name, values in seconds.items()},
        "ratios": [
            {"arm": arm, "peer": peer, "ratio": ratio(seconds, arm, peer), "goal": goal}
            for (arm, peer), goal in goals(shape).items()
        ],
    }


def _ours(w_OI: torch.Tensor, config: AdapterConfig, *, dora: bool) -> AdaptedLinear:
    linear = nn.Linear(w_OI.shape[1], w_OI.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(w_OI, requires_grad=False)
    layer = AdaptedLinear.from_linear(linear, config.model_copy(update={"dora": dora}))
    assert isinstance(layer.update, LoraUpdate)
    with torch.no_grad():
        layer.update.b_OR.normal_(std=0.02)
    return layer.train()


def _pass(layer: nn.Module, x: torch.Tensor, g: torch.Tensor, device: torch.device) -> Callable[[], float]:
    trained = [p for p in layer.parameters() if p.requires_grad]

    def once() -> float:
        for parameter in trained:
            parameter.grad = None
            torch.autograd.graph.increment_version([parameter])
        own_x = x.detach().requires_grad_()
        return timed(lambda: layer(own_x).backward(g), device)

    return once
