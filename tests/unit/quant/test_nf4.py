"""NF4 weights against bitsandbytes' own quantizer and dequantizer."""

from __future__ import annotations

import itertools

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.backends.utils import CODE
from hypothesis import given, settings
from hypothesis import strategies as st

from qdora.quant import base as tiling
from qdora.quant.base import FrozenWeight, align_rows
from qdora.quant.blockwise import code_values
from qdora.quant.dense import DenseWeight
from qdora.quant.fp4 import FP4Weight
from qdora.quant.nf4 import NF4Weight


def whole(weight: FrozenWeight, dtype: torch.dtype) -> torch.Tensor:
    return torch.cat([tile.clone() for _, tile in weight.tiles(dtype)])


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(48, 64), (70, 96), (33, 100), (7, 130), (300, 576)])
def test_bits_are_those_of_bitsandbytes(shape, dtype, double):
    """Catches: another code book, block order, nested offset or rounding than bitsandbytes has."""
    w_OI = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    ours = NF4Weight.from_dense(w_OI, double_quantization=double)
    packed, state = bnb.quantize_4bit(w_OI, blocksize=64, compress_statistics=double, quant_type="nf4")
    assert torch.equal(ours.packed.view(-1), packed.view(-1))
    state.shape = torch.Size((1, w_OI.numel()))  # in 2D its AVX512 kernel errs where rows are no whole blocks
    expected = bnb.dequantize_4bit(packed, state).float().view(shape)
    got = whole(ours, dtype).float()
    assert torch.equal(got, expected)


@given(
    rows=st.integers(1, 70),
    half_columns=st.integers(1, 90),
    tile_bytes=st.integers(64, 8192),
    double=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_tiles_are_the_whole_whatever_their_size(rows, half_columns, tile_bytes, double):
    """Catches: a tile that starts inside a block, repeats or loses a row, or takes a neighbour's scale."""
    w_OI = torch.randn(rows, 2 * half_columns, generator=torch.Generator().manual_seed(rows))
    weight = NF4Weight.from_dense(w_OI, double_quantization=double)
    one_tile = whole(weight, torch.float32)
    before = tiling.TILE_BYTES["cpu"]
    tiling.TILE_BYTES["cpu"] = tile_bytes
    try:
        spans = [(rows.start, rows.stop) for rows, _ in weight.tiles(torch.float32)]
        tiled = whole(weight, torch.float32)
    finally:
        tiling.TILE_BYTES["cpu"] = before
    assert torch.equal(tiled, one_tile)
    assert spans[0][0] == 0
    assert spans[-1][1] == rows
    assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))


@pytest.mark.parametrize("shape", [(8, 16), (16, 48), (8, 96), (7, 100), (8, 160), (16, 576), (5, 66)])
@pytest.mark.parametrize("block_size", [64, 128])
def test_each_value_is_its_code_times_the_scale_of_its_block(shape, block_size):
    """Catches: the scale of another block, which bitsandbytes' AVX512 kernel takes for rows that are no
    whole blocks."""
    weight = NF4Weight.from_dense(torch.randn(shape), block_size=block_size)
    codes = weight.packed.reshape(-1, 1) >> torch.tensor([4, 0], dtype=torch.uint8) & 15
    blocks = torch.arange(shape[0] * shape[1]) // block_size
    expected = CODE["nf4"].float()[codes.long().view(-1)] * weight.scales()[blocks]
    assert torch.allclose(whole(weight, torch.float32).view(-1), expected, rtol=1e-6, atol=0)


def test_rows_scaled_on_the_way():
    """Catches: a row scale that is lost, or taken for another row, in either way of applying it."""
    s_O = torch.randn(24)
    for inputs in (128, 96):  # rows of whole blocks, and others
        for weight in (NF4Weight.from_dense(torch.randn(24, inputs)), DenseWeight(torch.randn(24, inputs))):
            scaled = torch.cat([t.clone() for _, t in weight.tiles(torch.float32, s_O)])
            assert torch.allclose(scaled, whole(weight, torch.float32) * s_O[:, None], rtol=1e-6, atol=1e-7)


def test_rows_that_are_no_whole_blocks_are_grouped():
    """Catches: a tile boundary in the middle of a block where a row is not a multiple of 64."""
    assert align_rows(10, 96, 64) == 10
    assert align_rows(11, 96, 64) == 10
    assert align_rows(1, 100, 64) == 16
    assert align_rows(5, 128, 64) == 5


def test_odd_rows_are_refused():
    """Catches: two rows sharing a packed byte, silently."""
    with pytest.raises(ValueError, match="even, got 33"):
        NF4Weight.from_dense(torch.randn(4, 33))


def test_float64_tiles_hold_the_float32_values():
    """Catches: the exactness tests running on other weights than training does."""
    weight = NF4Weight.from_dense(torch.randn(20, 64))
    assert torch.equal(whole(weight, torch.float64), whole(weight, torch.float32).double())


def test_state_dict_carries_the_statistics():
    """Catches: statistics left out of the state dict, as happens to bitsandbytes' parameter when sharded."""
    weight = NF4Weight.from_dense(torch.randn(300, 128))
    names = set(weight.state_dict())
    assert names == {"packed", "absmax", "nested_absmax", "nested_code", "offset"}
    fresh = NF4Weight.from_dense(torch.randn(300, 128))
    fresh.load_state_dict(weight.state_dict())
    assert torch.equal(whole(fresh, torch.float32), whole(weight, torch.float32))


def test_dense_weight_is_widened_tile_by_tile_without_change(monkeypatch):
    """Catches: a 16-bit weight rounded again, or held in float32 as a whole."""
    monkeypatch.setitem(tiling.TILE_BYTES, "cpu", 4096)
    w_OI = torch.randn(100, 64).bfloat16()
    weight = DenseWeight(w_OI)
    sizes = [tile.shape[0] for _, tile in weight.tiles(torch.float32)]
    assert max(sizes) == 16
    assert torch.equal(whole(weight, torch.float32), w_OI.float())
    assert weight.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("block_size", [64, 128, 512])
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_codes_are_those_of_bitsandbytes_to_the_bit(name, block_size):
    """Catches: a value at, or next to, the middle between two codes that gets the other one; a short last
    block scaled as the full ones are; codes of FP4 in the order of their values."""
    code = code_values(name, torch.device("cpu")).sort().values
    middles = (code[1:] + code[:-1]) / 2
    generator = torch.Generator().manual_seed(block_size)
    for count in (2, block_size, 7 * block_size + block_size // 2, 40 * block_size + 2):
        at = middles[torch.randint(15, (count,), generator=generator)]
        away = torch.where(torch.rand(count, generator=generator) < 0.5, -2.0, 2.0)
        beside = torch.nextafter(at, away)
        for values in (torch.randn(count, generator=generator), at, beside):
            values[::block_size] = -1.0
            values[block_size : 2 * block_size] = 0.0
            for scale in (1.0, 1e-3, 3e37, 1e-30, 1e-39):
                expected = torch.ops.bitsandbytes.quantize_4bit(values * scale, block_size, name, torch.uint8)
                kind = {"nf4": NF4Weight, "fp4": FP4Weight}[name]
                weight = kind((1, 2), block_size=block_size, double_quantization=False)
                packed, scales = weight.quantize_block_values(values * scale)
                assert torch.equal(packed.view(-1), expected[0].view(-1))
                assert torch.equal(scales.view(-1), expected[1].view(-1))
