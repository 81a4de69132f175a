"""The kernels in Triton's interpreter, and the reference, against float64 and bitsandbytes."""

from __future__ import annotations

import functools

import pytest
import torch

from qdora.adapters.kernels import reference
from qdora.quant.base import StoredWeight
from qdora.quant.dense import DenseWeight
from tests.unit.adapters.kernels.cases import CASES, EPSILON, Case, assert_within, make

layer_of = functools.cache(make)


@pytest.fixture(params=["interpreted", "reference"])
def module(request):
    return reference if request.param == "reference" else request.getfixturevalue("interpreted")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tile_is_the_scaled_sum(module, case: Case):
    """Catches: nibbles in the wrong order, a neighbour's scale, s before the update, an unmasked rank, s or B
    of the tile's row instead of the weight's, a second rounding."""
    layer = layer_of(case)
    outputs, half = case.shape[0], torch.float16
    everything, part = slice(0, outputs), slice(3, outputs - 2)
    factors = (layer.a_RI, layer.b_OR, layer.scale)
    for rows, dtype, scaled in ((everything, torch.float32, True), (part, half, True), (part, half, False)):
        s_O = layer.s_O if scaled else None
        tile = module.adapted_tile(layer.weight, rows.start, rows.stop, dtype, s_O, *factors, 1.0)
        assert tile.dtype == dtype
        assert_within(tile, layer.tile(rows, dtype, update=True, scaled=scaled))
    tile = module.adapted_tile(layer.weight, 1, outputs, half, layer.s_O, None, None, 1.0, 1.0)
    assert_within(tile, layer.tile(slice(1, outputs), half, update=False, scaled=True))


@pytest.mark.parametrize("scaled", [True, False])
def test_a_factor_multiplies_the_tile(module, scaled: bool):
    """Catches: a factor that is left out with s, or without."""
    layer, rows = layer_of(CASES[1]), slice(0, CASES[1].shape[0])
    s_O = layer.s_O if scaled else None
    update = (layer.a_RI, layer.b_OR, layer.scale)
    tile = module.adapted_tile(layer.weight, 0, rows.stop, torch.float32, s_O, *update, 1.75)
    exact, error = layer.tile(rows, torch.float32, update=True, scaled=scaled)
    assert_within(tile, (1.75 * exact, 1.75 * error + exact.abs() * 2 * EPSILON))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_tile_is_that_of_bitsandbytes(module, case: Case, dtype):
    """Catches: scales that are summed and multiplied with one rounding, a table of other values."""
    layer = layer_of(case)
    tile = module.adapted_tile(layer.weight, 0, case.shape[0], dtype, None, None, None, 1.0, 1.0)
    assert torch.equal(tile, layer.frozen.dense(dtype))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_row_norm_is_that_of_the_sum(module, case: Case):
    """Catches: columns outside of W that count, which with a nested offset are not zero; a scale dropped."""
    layer = layer_of(case)
    assert_within(module.row_norm(layer.weight, layer.a_RI, layer.b_OR, layer.scale), layer.norm(update=True))
    norm_O = module.row_norm(layer.weight, None, None, 1.0)
    assert_within(norm_O, layer.norm(update=False))
    zero = torch.zeros_like(layer.b_OR)
    assert torch.equal(norm_O, module.row_norm(layer.weight, layer.a_RI, zero, layer.scale))


def test_an_empty_row_has_a_norm_to_divide_by(module):
    """Catches: 0/0 in the padded rows of a vocabulary; a NaN that the bound hides."""
    w_OI = torch.randn(5, 24)
    w_OI[1], w_OI[3, 7] = 0, torch.nan
    norm_O = module.row_norm(layer_weight(w_OI), None, None, 1.0)
    assert norm_O[1] == torch.tensor(torch.finfo(torch.float32).tiny).sqrt()
    assert norm_O.isnan().tolist() == [False, False, False, True, False]


def layer_weight(w_OI: torch.Tensor) -> StoredWeight:
    return DenseWeight(w_OI).stored()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 7), (127, 129), (301, 65), (128, 256)], ids=str)
def test_the_magnitudes_gradient_is_a_sum_over_tokens(module, shape, dtype):
    """Catches: tokens beyond N, a split that is lost or counted twice, a sum in 16 bits, 0/0."""
    generator = torch.Generator().manual_seed(sum(shape))
    g_NO, y_NO = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    m_O = torch.rand(shape[1], generator=generator) + 0.5
    m_O[-1], y_NO[:, -1] = 0, 0
    for given_NO in (g_NO, g_NO[:1].expand(shape)):
        exact = given_NO.double() * y_NO.double() / m_O.double().clamp_min(1e-30)
        bound = exact.abs().sum(0) * (min(shape[0], 40) + 2) * EPSILON
        grad_O, _ = module.output_gradients(given_NO, y_NO, m_O, None, None, 1.0)
        assert grad_O.dtype == torch.float32
        assert_within(grad_O, (exact.sum(0), bound))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("shape", "rank"),
    [((1, 7), 1), ((127, 129), 20), ((301, 65), 16), ((70, 20), 70), ((2100, 7), 3)],
    ids=str,
)
def test_the_gradient_of_b_is_a_product_over_tokens(module, shape, rank, dtype):
    """Catches: a rank of several programs that overwrite one another, a split without its tokens, s or c left
    out, more parts than are added up, the magnitude's sum lost beside it."""
    generator = torch.Generator().manual_seed(rank)
    g_NO, y_NO = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    h_NR = torch.randn(shape[0], rank + 3, generator=generator).to(dtype)[:, 3:]
    m_O, s_O = (torch.rand(shape[1], generator=generator) + 0.5 for _ in range(2))
    product, size = g_NO.double().T @ h_NR.double(), g_NO.double().abs().T @ h_NR.double().abs()
    in_16_bits = dtype.itemsize < 4 and module is reference  # whose product is rounded to them
    relative = torch.finfo(dtype).eps * 2 if in_16_bits else (3 + min(shape[0], 300)) * EPSILON
    for scale_O in (s_O, None):
        rows = 0.7 * (torch.ones_like(s_O) if scale_O is None else scale_O).double()[:, None]
        grad_O, grad_OR = module.output_gradients(g_NO, y_NO, m_O, h_NR, scale_O, 0.7)
        assert_within(grad_OR, (rows * product, rows * size * relative))
        assert grad_OR.dtype == torch.float32
        assert grad_OR.is_contiguous()
        alone_O, _ = module.output_gradients(g_NO, y_NO, m_O, None, None, 1.0)
        torch.testing.assert_close(grad_O, alone_O)
        _, alone_OR = module.output_gradients(g_NO, None, None, h_NR, scale_O, 0.7)
        assert torch.equal(grad_OR, alone_OR)


@pytest.mark.parametrize(("rows", "rank"), [(1, 1), (65, 16), (130, 70)])
@pytest.mark.parametrize("offset_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_row_scale(module, rows, rank, offset_dtype):
    """Catches: an offset that is rounded with the sum, f in s, a rank beyond the first block, B by the wrong
    stride."""
    generator = torch.Generator().manual_seed(rank)
    norm_O, initial_O = (torch.rand(rows, generator=generator) + 0.5 for _ in range(2))
    offset_O = (torch.randn(rows, generator=generator) * 1e-2).to(offset_dtype)
    b_OR = torch.randn(rows, rank + 2, generator=generator)[:, 2:]
    m_O, s_O, b_scaled_OR = module.row_scale(norm_O, initial_O, offset_O, b_OR, 1.75, torch.float16)
    exact_m = initial_O.double() + offset_O.double()
    exact_s = exact_m / norm_O.double()
    assert_within(m_O, (exact_m, exact_m * EPSILON))
    assert_within(s_O, (exact_s, 2 * exact_s * EPSILON))
    exact = 1.75 * exact_s[:, None] * b_OR.double()
    assert_within(b_scaled_OR, (exact, exact.abs() * (2.0**-11 + 5 * EPSILON) + 2.0**-25))
    assert b_scaled_OR.dtype == torch.float16
    again_m, again_s, nothing = module.row_scale(norm_O, initial_O, offset_O, None, 1.75, torch.float16)
    assert torch.equal(again_m, m_O)
    assert torch.equal(again_s, s_O)
    assert nothing.numel() == 0


def test_float64_stays_float64():
    """Catches: the reference of the exactness tests in float32."""
    layer = layer_of(CASES[0])
    w_OI, a_RI, b_OR = layer.w_OI, layer.a_RI.double(), layer.b_OR.double()
    exact = w_OI + layer.scale * b_OR @ a_RI
    weight = layer_weight(w_OI)
    norm_O = reference.row_norm(weight, a_RI, b_OR, layer.scale)
    torch.testing.assert_close(norm_O, exact.norm(dim=1), rtol=1e-14, atol=0)
    tile = reference.adapted_tile(weight, 2, 9, torch.float64, None, a_RI, b_OR, layer.scale, 1.0)
    torch.testing.assert_close(tile, exact[2:9], rtol=1e-13, atol=1e-13)
    m_O, s_O, b_scaled_OR = reference.row_scale(norm_O, norm_O, norm_O, b_OR, 1.5, torch.float64)
    torch.testing.assert_close(b_scaled_OR, 3 * b_OR, rtol=1e-14, atol=0)
    grad_O, grad_OR = reference.output_gradients(exact.T, exact.T, m_O, a_RI.T, s_O, 0.7)
    torch.testing.assert_close(grad_O, norm_O / 2, rtol=1e-13, atol=0)
    torch.testing.assert_close(grad_OR, 1.4 * exact @ a_RI.T, rtol=1e-13, atol=1e-13)
