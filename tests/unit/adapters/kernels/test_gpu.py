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
@pytest.mark.parametrize("rank", [1, 16, 70])
@pytest.mark.parametrize("shape", [(1, 7), (301, 65), (2048, 4096), (4099, 513), (513, 14336)], ids=str)
def test_output_gradients(shape, rank, dtype):
    """Catches: sums by atomics, whose last bits change from call to call; a product rounded to 16 bits."""
    generator = torch.Generator("cuda").manual_seed(5)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device="cuda")

    g_NO, y_NO, h_NR = draw(*shape).to(dtype), draw(*shape).to(dtype), draw(shape[0], rank).to(dtype)
    m_O, s_O = draw(shape[1]).abs() + 0.5, draw(shape[1]).abs() + 0.5
    grad_O, grad_OR = kernels.output_gradients(g_NO, y_NO, m_O, h_NR, s_O, 0.7)
    assert grad_O is not None
    assert grad_OR is not None
    exact = g_NO.double() * y_NO.double() / m_O.double()
    assert_within(grad_O, (exact.sum(0), exact.abs().sum(0) * 300 * EPSILON))
    rows = 0.7 * s_O.double()[:, None]
    exact, size = g_NO.double().T @ h_NR.double(), g_NO.double().abs().T @ h_NR.double().abs()
    assert_within(grad_OR, (rows * exact, rows * size * (3 + min(shape[0], 1024)) * EPSILON))
    again = kernels.output_gradients(g_NO, y_NO, m_O, h_NR, s_O, 0.7)
    assert again[0] is not None
    assert again[1] is not None
    assert torch.equal(grad_O, again[0])
    assert torch.equal(grad_OR, again[1])


@pytest.mark.parametrize("rank", [1, 16, 70])
def test_row_scale(rank):
    """Catches: an offset of 16 bits that is rounded with the sum; an approximate division; B cut off."""
    generator = torch.Generator("cuda").manual_seed(5)
    norm_O, initial_O = (torch.rand(4099, generator=generator, device="cuda") + 0.5 for _ in range(2))
    offset_O = (torch.randn(4099, generator=generator, device="cuda") * 1e-2).to(BF16)
    b_OR = torch.randn(4099, rank, generator=generator, device="cuda").to(BF16)
    m_O, s_O, b_scaled_OR = kernels.row_scale(norm_O, initial_O, offset_O, b_OR, 1.75, BF16)
    assert torch.equal(m_O, initial_O + offset_O)
    assert torch.equal(s_O, m_O / norm_O)
    assert b_scaled_OR is not None
    assert torch.equal(b_scaled_OR, (b_OR * (s_O * 1.75)[:, None]).to(BF16))


def test_compiled_code_calls_the_kernels():
    """Catches: a fake result that inductor takes at its word."""
    layer = make(CASES[1], "cuda")

    def both(s_O: torch.Tensor) -> torch.Tensor:
        norm_O = kernels.row_norm(layer.weight, **layer.update())
        return kernels.adapted_tile(layer.weight, slice(3, 9), BF16, s_O=s_O / norm_O, **layer.update())

    compiled = torch.compile(both, fullgraph=True)
    torch.testing.assert_close(compiled(layer.s_O), both(layer.s_O))
