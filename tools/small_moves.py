"""What the compute dtype makes of training at a small rate: the loss curve in bf16 against that in float32.

    python -m tools.small_moves [--json FILE] [--plot FILE.png]

A stack of adapted layers learns what a slightly different stack computes, in 200 steps at 1e-5: each moves
a weight by less than its spacing in bf16.  Every arm has float32 masters and sees the same batches; they
differ in the dtype of the inputs alone, in which the layers compute.  `kept` is the slope of the fall of the
loss in bf16 on that in float32, over all steps.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from tabulate import tabulate
from torch import nn

from qdora.adapters.layer import AdaptedLinear
from qdora.config import AdapterConfig, QuantizationName, TrainingConfig
from qdora.training.optimizer import AdapterOptimizer

SIDE, LAYERS, TOKENS, R, RATE, STEPS = 256, 3, 512, 8, 1e-5, 200
ARMS: dict[str, tuple[QuantizationName, bool]] = {
    "qdora": ("nf4", True),
    "qlora": ("nf4", False),
    "dora": ("none", True),
    "lora": ("none", False),
}
"""Format of the base weights, and whether there is a magnitude."""


def stack(quantization: QuantizationName, dora: bool) -> nn.Sequential:
    """The layers at their start, in training mode."""
    torch.manual_seed(0)
    config = AdapterConfig(dora=dora, r=R, alpha=16.0, dtype="bfloat16")
    linears = [nn.Linear(SIDE, SIDE, bias=False).bfloat16() for _ in range(LAYERS)]
    layers = [
        AdaptedLinear.from_linear(w, config, quantization=quantization, seed=i) for i, w in enumerate(linears)
    ]
    return nn.Sequential(*layers).train()


def teacher_of(model: nn.Sequential) -> list[torch.Tensor]:
    """The weights of a stack that is a rank-8 update and one percent of the magnitudes away."""
    generator = torch.Generator().manual_seed(1)
    weights = []
    for layer in model:
        assert isinstance(layer, AdaptedLinear)
        w_OI = layer.base.dense(torch.float32)
        update_OI = torch.randn(SIDE, R, generator=generator) @ torch.randn(R, SIDE, generator=generator)
        w_OI = w_OI + update_OI * (0.02 * w_OI.norm() / update_OI.norm())
        weights.append(w_OI * (1 + 0.01 * torch.randn(SIDE, 1, generator=generator)))
    return weights


def curve(quantization: QuantizationName, dora: bool, compute: torch.dtype) -> list[float]:
    """The loss of each step, on one batch, computed as the arm computes it."""
    model = stack(quantization, dora)
    weights = teacher_of(model)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = AdapterOptimizer(parameters, TrainingConfig(max_steps=STEPS, learning_rate=RATE))
    x_NI = torch.randn(TOKENS, SIDE, generator=torch.Generator().manual_seed(2)).to(compute)
    target_NO = x_NI.float()
    for w_OI in weights:
        target_NO = target_NO @ w_OI.T
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x_NI).float(), target_NO)
        loss.backward()
        optimizer.step(RATE)
        losses.append(float(loss.detach()))
    return losses


def kept(half: list[float], full: list[float]) -> float:
    """The slope of one curve's fall on the other's."""
    falls = [torch.tensor(losses, dtype=torch.float64) - losses[0] for losses in (half, full)]
    return float(falls[0] @ falls[1] / (falls[1] @ falls[1]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the curves there")
    parser.add_argument("--plot", type=Path, help="draw them there")
    arguments = parser.parse_args()
    curves: dict[str, dict[str, list[float]]] = {}
    for name, (quantization, dora) in ARMS.items():
        curves[name] = {
            str(compute).removeprefix("torch."): curve(quantization, dora, compute)
            for compute in (torch.float32, torch.bfloat16)
        }
    rows = [
        (
            name,
            c["float32"][0],
            c["float32"][-1],
            c["bfloat16"][0],
            c["bfloat16"][-1],
            kept(c["bfloat16"], c["float32"]),
        )
        for name, c in curves.items()
    ]
    titles = ["arm", "float32, first", "last", "bfloat16, first", "last", "kept"]
    print(tabulate(rows, headers=titles, floatfmt=("", *[".4e"] * 4, ".3f")))
    if arguments.json:
        arguments.json.write_text(json.dumps(curves), encoding="utf-8")
    if arguments.plot:
        figure, all_axes = plt.subplots(1, len(curves), figsize=(14, 3.4), constrained_layout=True)
        for axes, (name, of_arm) in zip(all_axes, curves.items(), strict=True):
            for dtype, losses in of_arm.items():
                axes.plot(losses, label=dtype, linewidth=1)
            axes.set_title(name)
            axes.set_xlabel("step")
        all_axes[0].set_ylabel("loss")
        all_axes[0].legend()
        figure.savefig(arguments.plot, dpi=110)


if __name__ == "__main__":
    main()
