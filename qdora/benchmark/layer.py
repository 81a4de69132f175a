"""Forward and backward of one adapted layer, ours and PEFT's."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from qdora.adapters.layer import AdaptedLinear
from qdora.benchmark.peers import alternate, autocast, medians, peft_layer, ratios, timed
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
PAIRS = (("qdora", "peft qdora"), ("qdora", "peft qlora"), ("qdora", "qlora"))
"""Arms and peers whose ratio of times is reported."""


def benchmark_layer(
    shape: Shape, config: AdapterConfig, dtype: torch.dtype, device: torch.device, rounds: int
) -> dict[str, Any]:
    """Median milliseconds of each arm and the ratios of `PAIRS`, for one shape.

    Each pass follows a change of B, as in training with one micro-batch a step: every norm is
    computed anew.
    """
    generator = torch.Generator().manual_seed(0)
    w_OI = (torch.randn(shape.out_features, shape.in_features, generator=generator) * 0.02).to(device)
    x_BTI = torch.randn(1, shape.tokens, shape.in_features, generator=generator).to(device, dtype)
    g_BTO = torch.randn(1, shape.tokens, shape.out_features, generator=generator).to(device, dtype)
    layers = {
        "qdora": _our_layer(w_OI, config, dora=True),
        "qlora": _our_layer(w_OI, config, dora=False),
        "peft qdora": peft_layer(w_OI, config, dora=True, compute=dtype),
        "peft qlora": peft_layer(w_OI, config, dora=False, compute=dtype),
    }
    # Our layers compute in the dtype of their inputs by themselves.
    arms = {
        name: _pass(layer, x_BTI, g_BTO, autocast(device, dtype) if "peft" in name else nullcontext())
        for name, layer in layers.items()
    }
    seconds = alternate(arms, rounds, title=str(shape))
    return {
        "shape": asdict(shape),
        "milliseconds": {name: 1e3 * median for name, median in medians(seconds).items()},
        "ratios": ratios(seconds, PAIRS),
    }


def _our_layer(w_OI: torch.Tensor, config: AdapterConfig, *, dora: bool) -> AdaptedLinear:
    """NF4 with an adapter, B off zero, in training mode."""
    linear = nn.Linear(w_OI.shape[1], w_OI.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(w_OI, requires_grad=False)
    layer = AdaptedLinear.from_linear(linear, config.model_copy(update={"dora": dora}))
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.endswith("b_OR"):
                parameter.normal_(std=0.02)
    return layer.train()


def _pass(
    layer: nn.Module, x_BTI: torch.Tensor, g_BTO: torch.Tensor, precision: AbstractContextManager[object]
) -> Callable[[], float]:
    trained = [p for p in layer.parameters() if p.requires_grad]

    def once() -> float:
        for parameter in trained:
            parameter.grad = None
            torch.autograd.graph.increment_version([parameter])
        x = x_BTI.detach().requires_grad_()

        def work() -> None:
            with precision:
                y = layer(x)
            y.backward(g_BTO.to(y.dtype))

        return timed(work, x.device)

    return once
