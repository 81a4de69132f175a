"""How far bf16 factors still move when the learning rate has decayed to 1%, by way of stepping them.

    python -m tools.small_rate_tail

Every arm starts from the same trained stack of QDoRA layers, its factors on the bf16 grid, and takes the
same 100 batches at 1% of the rate.  A movement is the projection on what float32 did, in its units:
1 is all of it, 0 is none.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Literal

import optimi
import torch
from tabulate import tabulate
from torch import nn

from qdora.adapters.layer import AdaptedLinear
from qdora.config import AdapterConfig, TrainingConfig
from qdora.training.optimizer import AdapterOptimizer

SIDE, R, RATE, STEPS = 128, 8, 1e-3, 100
Step = Callable[[], None]
AdapterDtype = Literal["bfloat16", "float32"]


def make_stack(dtype: AdapterDtype) -> nn.Sequential:
    torch.manual_seed(0)
    config = AdapterConfig(r=R, alpha=16.0, dtype=dtype)
    return nn.Sequential(
        *(AdaptedLinear.from_linear(nn.Linear(SIDE, SIDE), config, seed=i) for i in range(3))
    )


def batch(i: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(i)
    x = torch.randn(64, SIDE, generator=generator)
    teacher = torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(-1)) / SIDE**0.5
    return x, torch.tanh(x @ teacher)


def loss_of(model: nn.Module, i: int) -> torch.Tensor:
    x, y = batch(i)
    return nn.functional.mse_loss(model(x), y)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def masters(parameters: Mapping[str, nn.Parameter], rate: float) -> Step:
    """What qdora does: AdamW on float32 masters."""
    optimizer = AdapterOptimizer(parameters, TrainingConfig(max_steps=1, learning_rate=rate))
    return lambda: optimizer.step(rate)


def naive(parameters: Mapping[str, nn.Parameter], rate: float) -> Step:
    """AdamW's float32 update, added to the bf16 value and rounded to the nearest."""
    return _rounded(parameters, rate, lambda value, dtype: value.to(dtype))


def stochastic(parameters: Mapping[str, nn.Parameter], rate: float) -> Step:
    """The same, rounded up or down at random, so that the mean is right."""
    generator = torch.Generator().manual_seed(0)

    def rounded(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        noise = torch.randint(0, 1 << 16, value.shape, generator=generator, dtype=torch.int32)
        bits = (value.contiguous().view(torch.int32) + noise) & ~0xFFFF
        return bits.view(torch.float32).to(dtype)

    return _rounded(parameters, rate, rounded)


def _rounded(
    parameters: Mapping[str, nn.Parameter],
    rate: float,
    rounded: Callable[[torch.Tensor, torch.dtype], torch.Tensor],
) -> Step:
    own = {name: nn.Parameter(p.detach().float()) for name, p in parameters.items()}
    adamw = torch.optim.AdamW(own.values(), lr=rate, weight_decay=0.0)

    @torch.no_grad()
    def step() -> None:
        for name, parameter in parameters.items():
            own[name].copy_(parameter)
            own[name].grad = parameter.grad
        adamw.step()
        for name, parameter in parameters.items():
            parameter.copy_(rounded(own[name], parameter.dtype))

    return step


def kahan(parameters: Mapping[str, nn.Parameter], rate: float) -> Step:
    """optimi's AdamW: what rounding loses is kept in a bf16 tensor beside the value."""
    for parameter in parameters.values():
        parameter.grad_dtype = parameter.dtype
    optimizer = optimi.AdamW(
        list(parameters.values()),
        lr=rate,
        betas=(0.9, 0.999),
        weight_decay=0.0,
        kahan_sum=True,
        foreach=False,
    )
    return lambda: optimizer.step()


ARMS: dict[str, tuple[AdapterDtype, Callable[[Mapping[str, nn.Parameter], float], Step], int]] = {
    "float32": ("float32", masters, 16),
    "bf16, naive": ("bfloat16", naive, 14),
    "bf16, stochastic rounding": ("bfloat16", stochastic, 14),
    "bf16, Kahan summation (optimi)": ("bfloat16", kahan, 10),
    "bf16, float32 masters (qdora)": ("bfloat16", masters, 18),
}
"""Storage, means, and bytes a trained parameter: value, master or compensation, gradient, moments."""


def common_start() -> dict[str, torch.Tensor]:
    """A stack after 200 steps at the full rate, its factors on the bf16 grid."""
    model = make_stack("float32")
    step = masters(trained(model), RATE)
    for i in range(200):
        model.zero_grad()
        loss_of(model, i).backward()
        step()
    return {name: p.detach().bfloat16() for name, p in trained(model).items()}


def tail(arm: str, start: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], float]:
    """Movement of each parameter over the tail, and the fall of the mean loss."""
    dtype, means, _ = ARMS[arm]
    model = make_stack(dtype)
    parameters = trained(model)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(start[name])
    before = mean_loss(model)
    step = means(parameters, RATE / 100)
    for i in range(STEPS):
        model.zero_grad()
        loss_of(model, 1000 + i).backward()
        step()
    moved = {name: p.detach().float() - start[name].float() for name, p in parameters.items()}
    return moved, before - mean_loss(model)


@torch.no_grad()
def mean_loss(model: nn.Module) -> float:
    return sum(float(loss_of(model, 5000 + i)) for i in range(20)) / 20


def projection(moved: Mapping[str, torch.Tensor], reference: Mapping[str, torch.Tensor], leaf: str) -> float:
    """Of the movement of all parameters of one kind on the reference's, in the reference's units."""
    names = [name for name in reference if name.endswith(leaf)]
    a = torch.cat([moved[name].flatten() for name in names]).double()
    b = torch.cat([reference[name].flatten() for name in names]).double()
    return float(a @ b / (b @ b))


def measure() -> dict[str, dict[str, float]]:
    """Movement of A, B and the magnitude and the fall of the loss, each relative to float32's."""
    start = common_start()
    moved = {arm: tail(arm, start) for arm in ARMS}
    reference, fall = moved["float32"]
    return {
        arm: {leaf: projection(own, reference, leaf) for leaf in ("a_RI", "b_OR", "offset_O")}
        | {"fall of the loss": own_fall / fall}
        for arm, (own, own_fall) in moved.items()
    }


def main() -> None:
    """Measure and print."""
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    results = measure()
    rows = [
        [arm, *(f"{value:.3f}" for value in values.values()), ARMS[arm][2]] for arm, values in results.items()
    ]
    print(tabulate(rows, headers=["means", "A", "B", "offset of m", "fall of the loss", "bytes a parameter"]))


if __name__ == "__main__":
    main()
