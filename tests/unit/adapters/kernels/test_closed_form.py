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
        tile = module.adapted_tile(layer.weight, rows.start, rows.stop, dtype, s_O, *factors)
        assert tile.dtype == dtype
        assert_within(tile, layer.tile(rows, dtype, update=True, scaled=scaled))
    tile = module.adapted_tile(layer.weight, 1, outputs, half, layer.s_O, None, None, 1.0)
    assert_within(tile, layer.tile(slice(1, outputs), half, update=False, scaled=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_tile_is_that_of_bitsandbytes(module, case: Case, dtype):
    """Catches: scales that are summed and multiplied with one rounding, a table of other values."""
    layer = layer_of(case)
    tile = module.adapted_tile(layer.weight, 0, case.shape[0], dtype, None, None, None, 1.0)
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
def test_column_dot_is_the_sum_over_tokens(module, shape, dtype):
    """Catches: tokens beyond N, a split that is lost or counted twice, a sum in 16 bits."""
    generator = torch.Generator().manual_seed(sum(shape))
    g_NO, y_NO = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    exact = g_NO.double() * y_NO.double()
    bound = exact.abs().sum(0) * (min(shape[0], 40) + 1) * EPSILON
    result = module.column_dot(g_NO, y_NO)
    assert result.dtype == torch.float32
    assert_within(result, (exact.sum(0), bound))
    expanded = g_NO[:1].expand(shape)
    exact = expanded.double() * y_NO.double()
    assert_within(module.column_dot(expanded, y_NO), (exact.sum(0), exact.abs().sum(0) * 41 * EPSILON))


def test_float64_stays_float64():
    """Catches: the reference of the exactness tests in float32."""
    layer = layer_of(CASES[0])
    w_OI, a_RI, b_OR = layer.w_OI, layer.a_RI.double(), layer.b_OR.double()
    exact = w_OI + layer.scale * b_OR @ a_RI
    weight = layer_weight(w_OI)
    norm_O = reference.row_norm(weight, a_RI, b_OR, layer.scale)
    torch.testing.assert_close(norm_O, exact.norm(dim=1), rtol=1e-14, atol=0)
    tile = reference.adapted_tile(weight, 2, 9, torch.float64, None, a_RI, b_OR, layer.scale)
    torch.testing.assert_close(tile, exact[2:9], rtol=1e-13, atol=1e-13)
    assert reference.column_dot(exact, w_OI).dtype == torch.float64
