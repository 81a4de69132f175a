"""Quantization by shares: what the ranks make together is what one process makes, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qdora.quant import nf4_quantize, weight
from qdora.quant.nf4 import NF4Weight
from qdora.quant.nf4_quantize import block_count, quantize_share, rows_to_read
from qdora.quant.share import WHOLE, Share


def quantize_by_shares(w_OI: torch.Tensor, count: int, *, block_size: int, double: bool):
    """What each of `count` ranks makes, the exchange of their scales played by calling everyone twice."""
    shape = tuple(w_OI.shape)
    shares = [Share(rank, count) for rank in range(count)]
    own_scales: list[torch.Tensor] = []

    def quantize(share, gather):
        rows = rows_to_read(shape, block_size, share)
        return quantize_share(
            w_OI[rows],
            shape,
            block_size=block_size,
            double_quantization=double,
            share=share,
            gather_scales=gather,
        )

    def listen(scales):
        own_scales.append(scales)
        return torch.zeros(block_count(shape, block_size))

    if double:
        for share in shares:
            quantize(share, listen)
    return [quantize(share, lambda _: torch.cat(own_scales)) for share in shares]


@given(
    rows=st.integers(1, 40),
    half_columns=st.integers(1, 80),
    count=st.integers(1, 7),
    block_size=st.sampled_from([64, 128]),
    double=st.booleans(),
)
@example(rows=5, half_columns=48, count=2, block_size=64, double=True)  # rows, blocks and shares all straddle
@example(rows=3, half_columns=32, count=4, block_size=64, double=True)  # a rank without rows
@example(rows=1, half_columns=1, count=3, block_size=64, double=False)  # less than a block
@settings(max_examples=150, deadline=None)
def test_shares_are_the_whole(rows, half_columns, count, block_size, double):
    """Catches: a block cut at a shard boundary, scales or codes of a neighbour, an offset of own scales only,
    a rank without rows that fails."""
    w_OI = torch.randn(rows, 2 * half_columns, generator=torch.Generator().manual_seed(rows))
    expected = NF4Weight.quantize(w_OI, block_size=block_size, double_quantization=double)
    parts = quantize_by_shares(w_OI, count, block_size=block_size, double=double)
    assert torch.equal(torch.cat([p.packed for p in parts]), expected.packed)
    assert torch.equal(torch.cat([p.absmax for p in parts]), expected.absmax)
    for part in parts if double else []:
        assert torch.equal(part.nested_absmax, expected.nested_absmax)
        assert torch.equal(part.nested_code, expected.nested_code)
        assert torch.equal(part.offset, expected.offset)


@pytest.mark.parametrize("count", [2, 4, 8])
def test_a_rank_reads_its_rows_and_at_most_the_rest_of_a_block(count):
    """Catches: every rank reading the whole weight."""
    for shape in [(4096, 4096), (1000, 576), (11008, 100)]:
        own = -(-shape[0] // count)
        extra = 2 * (-(-64 // shape[1]) + count)
        for rank in range(count):
            rows = rows_to_read(shape, 64, Share(rank, count))
            assert rows.stop - rows.start <= own + extra
    assert rows_to_read((7, 100), 64, WHOLE) == slice(0, 7)


def test_what_is_kept_is_the_share_alone():
    """Catches: a share that is a view, and keeps the codes of its neighbours in memory."""
    w_OI = torch.randn(64, 96)
    for part in quantize_by_shares(w_OI, 4, block_size=64, double=True):
        assert part.packed.untyped_storage().nbytes() == 64 * 96 // 2 // 4
        assert part.absmax.untyped_storage().nbytes() == 64 * 96 // 64 // 4


def test_the_offset_does_not_depend_on_the_threads():
    """Catches: scales summed in another order by two ranks of one thread each than by one rank of two."""
    w_OI = torch.randn(2048, 1024, generator=torch.Generator().manual_seed(0)) * torch.rand(2048, 1)
    before = torch.get_num_threads()
    offsets = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        offsets.append(NF4Weight.quantize(w_OI).offset)
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    assert torch.equal(offsets[0], offsets[1])
    assert torch.equal(offsets[0], offsets[2])


def test_tiles_do_not_change_the_codes(monkeypatch):
    """Catches: a tile of the quantizer that begins inside a block."""
    w_OI = torch.randn(33, 100, generator=torch.Generator().manual_seed(0))
    expected = NF4Weight.quantize(w_OI)
    monkeypatch.setitem(weight.TILE_BYTES, "cpu", 1000)
    assert nf4_quantize.TILE_BYTES is weight.TILE_BYTES
    tiled = NF4Weight.quantize(w_OI)
    assert torch.equal(tiled.packed, expected.packed)
    assert torch.equal(tiled.absmax, expected.absmax)
