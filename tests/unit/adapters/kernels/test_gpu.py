"""The kernels on a GPU: what the interpreter cannot show, bf16 above all, and the sizes of a large model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qdora.adapters import kernels
from tests.unit.adapters.kernels.cases import CASES, EPSILON, Case, assert_within, make

BF16 = torch.bfloat16
LARGE = [
    Case("nf4", (4096, 14336), 16),
    Case("nf4", (1024, 4096), 64),
    Case("fp4", (4096, 4096), 20, double=False),
    Case("int8", (1024, 4096), 16),
    Case("none", (1536, 4096), 16, dtype=BF16),
]
ON_GPU = [*CASES, *(replace(case, factors=(BF16, BF16)) for case in [*CASES, *LARGE])]

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def needs_kernels():
    if not kernels.available(torch.device("cuda")):
        pytest.skip("no Triton, or too old a GPU")


@pytest.mark.parametrize("case", ON_GPU, ids=str)
def test_tile(case: Case):
    """Catches: on tensor cores what the interpreter's tests name; bf16 that is cut off instead of rounded."""
    layer, outputs = make(case, "cuda"), case.shape[0]
    for rows, dtype in (
        (slice(0, outputs), BF16),
        (slice(3, outputs - 2), BF16),
        (slice(1, outputs), torch.float32),
    ):
        tile = kernels.adapted_tile(layer.weight, rows, dtype, s_O=layer.s_O, **layer.update())
        assert_within(tile, layer.tile(rows, dtype, update=True, scaled=True))
        tile = kernels.adapted_tile(layer.weight, rows, dtype, **layer.update())
        assert_within(tile, layer.tile(rows, dtype, update=True, scaled=False))


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
def test_tile_is_that_of_bitsandbytes(case: Case, dtype):
    """Catches: a product and a sum in one rounding, which the compiler makes where it may."""
    layer = make(case, "cuda")
    tile = kernels.adapted_tile(layer.weight, slice(0, case.shape[0]), dtype)
    assert torch.equal(tile, layer.frozen.dense(dtype))


@pytest.mark.parametrize("case", ON_GPU, ids=str)
def test_row_norm(case: Case):
    """Catches: sums whose order follows from the layout of the product, so that B = 0 is another norm."""
    layer = make(case, "cuda")
    exact, error = layer.norm(update=True)
    steps = case.shape[1] // 256 * EPSILON * exact
    norm_O = kernels.row_norm(layer.weight, **layer.update())
    assert_within(norm_O, (exact, error + steps))
    assert torch.equal(norm_O, kernels.row_norm(layer.weight, **layer.update()))
    base_O = kernels.row_norm(layer.weight)
    exact, error = layer.norm(update=False)
    assert_within(base_O, (exact, error + steps))
    layer.b_OR = torch.zeros_like(layer.b_OR)
    assert torch.equal(base_O, kernels.row_norm(layer.weight, **layer.update()))


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 7), (301, 65), (2048, 4096), (513, 14336)], ids=str)
def test_column_dot(shape, dtype):
    """Catches: sums by atomics, whose last bits change from call to call."""
    generator = torch.Generator("cuda").manual_seed(5)
    g_NO, y_NO = (torch.randn(shape, generator=generator, device="cuda").to(dtype) for _ in range(2))
    exact = g_NO.double() * y_NO.double()
    result = kernels.column_dot(g_NO, y_NO)
    assert_within(result, (exact.sum(0), exact.abs().sum(0) * 41 * EPSILON))
    assert torch.equal(result, kernels.column_dot(g_NO, y_NO))


def test_compiled_code_calls_the_kernels():
    """Catches: a fake result that inductor takes at its word."""
    layer = make(CASES[1], "cuda")

    def both(s_O: torch.Tensor) -> torch.Tensor:
        norm_O = kernels.row_norm(layer.weight, **layer.update())
        return kernels.adapted_tile(layer.weight, slice(3, 9), BF16, s_O=s_O / norm_O, **layer.update())

    compiled = torch.compile(both, fullgraph=True)
    torch.testing.assert_close(compiled(layer.s_O), both(layer.s_O))
