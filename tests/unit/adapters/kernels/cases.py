"""Weights, factors and scales for the kernels, and the closed forms in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from qdora.quant import QUANTIZATIONS
from qdora.quant.base import FrozenWeight, StoredWeight

EPSILON = 2.0**-24
"""Largest relative error of one rounding to float32."""


@dataclass(frozen=True)
class Case:
    """One layer; `factors` are the dtypes of A and B."""

    format: str
    shape: tuple[int, int]
    rank: int
    block: int = 64
    double: bool = True
    dtype: torch.dtype = torch.float32
    factors: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32)

    def __str__(self) -> str:
        scales = "double" if self.double else "single"
        shape = "x".join(map(str, self.shape))
        return f"{self.format} {self.dtype} {shape} {scales} {self.block} r{self.rank}".replace("torch.", "")


HALF = torch.float16
CASES = [
    Case("nf4", (70, 200), 20, 32),  # more than one nested block, rows that are no whole blocks
    Case("nf4", (65, 576), 16, 64, factors=(HALF, HALF)),
    Case("nf4", (35, 130), 3, 128, double=False),  # chunks of one byte
    Case("nf4", (37, 516), 70, 64),  # a rank of several products, chunks of two bytes, blocks across rows
    Case("fp4", (67, 136), 1, 1024),  # a block of many rows
    Case("fp4", (33, 200), 40, 64, double=False, factors=(HALF, torch.float32)),
    Case("int8", (67, 129), 16, 64),  # an odd width
    Case("int8", (19, 520), 20, 256, double=False),
    Case("none", (66, 131), 3),
    Case("none", (33, 136), 16, dtype=HALF, factors=(HALF, HALF)),
    Case("none", (33, 136), 40, dtype=torch.bfloat16),
]


@dataclass
class Layer:
    """A case's tensors.

    Attributes:
        frozen: the weight, whose own tiles bitsandbytes makes.
        weight: what the kernels read of it.
        w_OI: in float64, from bitsandbytes.
        a_RI: a view of a wider matrix, as VeRA's.
    """

    frozen: FrozenWeight
    weight: StoredWeight
    w_OI: torch.Tensor
    a_RI: torch.Tensor
    b_OR: torch.Tensor
    s_O: torch.Tensor
    scale: float = 0.7

    def update(self) -> dict[str, Any]:
        """Arguments of the kernels."""
        return {"a_RI": self.a_RI, "b_OR": self.b_OR, "scale": self.scale}

    def updated(self, *, update: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """W + c B A in float64, and how far float32 may be from it."""
        if not update:
            return self.w_OI, torch.zeros_like(self.w_OI)
        a_RI, b_OR = self.a_RI.double(), self.b_OR.double()
        size = self.w_OI.abs() + abs(self.scale) * (b_OR.abs() @ a_RI.abs())
        return self.w_OI + self.scale * (b_OR @ a_RI), size * (a_RI.shape[0] + 3) * EPSILON

    def tile(
        self, rows: slice, dtype: torch.dtype, *, update: bool, scaled: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """s ∘ (W + c B A) in float64, and how far a result rounded once to `dtype` may be from it."""
        exact, error = self.updated(update=update)
        if scaled:
            s_O = self.s_O.double()[:, None]
            exact, error = exact * s_O, error * s_O + exact.abs() * s_O * EPSILON
        least = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
        error = error + exact.abs() * torch.finfo(dtype).eps / 2 * 1.001 + least
        return exact[rows], error[rows]

    def norm(self, *, update: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """||W + c B A|| in float64, and how far float32 may be from it."""
        exact, error = self.updated(update=update)
        norm_O = exact.norm(dim=1)
        return norm_O, error.norm(dim=1) + norm_O * 32 * EPSILON


def make(case: Case, device: str = "cpu") -> Layer:
    """The tensors of a case, away from every identity: B ≠ 0, s ≠ 1, c ≠ 1."""
    (outputs, inputs), rank = case.shape, case.rank
    generator = torch.Generator().manual_seed(outputs * inputs + rank)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    w_OI = (draw(outputs, inputs) * (1 + draw(outputs, 1).abs())).to(device, case.dtype)
    frozen = QUANTIZATIONS[case.format].from_dense(
        w_OI, block_size=case.block, double_quantization=case.double
    )
    weight = frozen.stored()
    assert weight is not None
    a_dtype, b_dtype = case.factors
    return Layer(
        frozen,
        weight,
        frozen.dense(torch.float32).double(),
        draw(rank, inputs + 5).to(device, a_dtype)[:, :inputs],
        draw(outputs, rank).to(device, b_dtype),
        (draw(outputs).abs() + 0.1).to(device),
    )


def assert_within(got: torch.Tensor, exact_and_error: tuple[torch.Tensor, torch.Tensor]) -> None:
    """No entry is farther from its exact value than rounding can take it."""
    exact, error = exact_and_error
    assert got.shape == exact.shape
    beyond = (got.double() - exact).abs() - error
    assert bool((beyond <= 0).all()), f"{beyond.max()} beyond the bound at {int(beyond.argmax())}"
