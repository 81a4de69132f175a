"""Quantization by shards: what the ranks quantize is what one process does, bit for bit, in every format."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qdora.quant import QUANTIZATIONS, base
from qdora.quant.base import FULL, Shard
from qdora.quant.nf4 import NF4Weight

QUANTIZED = [name for name in QUANTIZATIONS if name != "none"]


def on_meta(name: str, shape: tuple[int, int], *, block_size: int = 64, double: bool = True):
    return QUANTIZATIONS[name].on_meta(
        shape, dtype=torch.float32, block_size=block_size, double_quantization=double
    )


def quantize_by_shards(name: str, w_OI: torch.Tensor, count: int, *, block_size: int, double: bool):
    """What each of `count` ranks makes; the gather of their scales is played by calling all of them twice."""
    weight = on_meta(name, tuple(w_OI.shape), block_size=block_size, double=double)
    shards = [Shard(rank, count) for rank in range(count)]
    local_scales: list[torch.Tensor] = []

    def quantize(shard, gather):
        return weight.from_rows(w_OI[weight.rows_to_read(shard)], shard, gather)

    def listen(scales, size):
        local_scales.append(scales)
        return torch.zeros(size)

    if double:
        for shard in shards:
            quantize(shard, listen)
    return [quantize(shard, lambda *_: torch.cat(local_scales)) for shard in shards]


@given(
    name=st.sampled_from(QUANTIZED),
    rows=st.integers(1, 40),
    half_columns=st.integers(1, 80),
    count=st.integers(1, 7),
    block_size=st.sampled_from([64, 128]),
    double=st.booleans(),
)
@example(name="nf4", rows=5, half_columns=48, count=2, block_size=64, double=True)  # all of them straddle
@example(name="nf4", rows=3, half_columns=32, count=4, block_size=64, double=True)  # a rank without rows
@example(name="nf3", rows=3, half_columns=17, count=2, block_size=64, double=True)  # a short last block
@example(name="int8", rows=1, half_columns=1, count=3, block_size=64, double=False)  # less than a block
@settings(max_examples=200, deadline=None)
def test_shards_are_the_full_weight(name, rows, half_columns, count, block_size, double):
    """Catches: a block cut at a shard boundary, scales or codes of a neighbour, an offset of local scales,
    a rank without rows that fails."""
    w_OI = torch.randn(rows, 2 * half_columns, generator=torch.Generator().manual_seed(rows))
    expected = QUANTIZATIONS[name].from_dense(w_OI, block_size=block_size, double_quantization=double)
    parts = quantize_by_shards(name, w_OI, count, block_size=block_size, double=double)
    assert torch.equal(torch.cat([p["packed"] for p in parts]), expected.packed)
    assert torch.equal(torch.cat([p["absmax"] for p in parts]), expected.absmax)
    for part in parts if double else []:
        for statistic in ("nested_absmax", "nested_code", "offset"):
            assert torch.equal(part[statistic], getattr(expected, statistic))


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("count", [2, 4, 8])
def test_a_rank_reads_its_rows_and_at_most_the_rest_of_a_block(count, name):
    """Catches: every rank reading the full weight."""
    for shape in [(4096, 4096), (1000, 576), (11008, 100)]:
        own = -(-shape[0] // count)
        extra = 2 * (-(-64 // shape[1]) + count)
        for rank in range(count):
            rows = on_meta(name, shape).rows_to_read(Shard(rank, count))
            assert rows.stop - rows.start <= own + extra
    assert on_meta(name, (7, 100)).rows_to_read(FULL) == slice(0, 7)


@pytest.mark.parametrize(("name", "per_byte"), [("nf4", 2), ("fp4", 2), ("int8", 1), ("nf3", 1)])
def test_what_is_kept_is_the_shard_alone(name, per_byte):
    """Catches: a shard that is a view, and keeps the codes of its neighbours in memory."""
    w_OI = torch.randn(64, 96)
    for part in quantize_by_shards(name, w_OI, 4, block_size=64, double=True):
        assert part["packed"].untyped_storage().nbytes() == 64 * 96 // per_byte // 4
        assert part["absmax"].untyped_storage().nbytes() == 64 * 96 // 64 // 4


def test_the_offset_does_not_depend_on_the_threads():
    """Catches: scales summed in another order by two ranks of one thread each than by one rank of two."""
    w_OI = torch.randn(2048, 1024, generator=torch.Generator().manual_seed(0)) * torch.rand(2048, 1)
    before = torch.get_num_threads()
    offsets = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        offsets.append(NF4Weight.from_dense(w_OI).offset)
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    assert torch.equal(offsets[0], offsets[1])
    assert torch.equal(offsets[0], offsets[2])


@pytest.mark.parametrize("name", QUANTIZED)
def test_tiles_do_not_change_the_codes(monkeypatch, name):
    """Catches: a tile of the quantizer that begins inside a block."""
    w_OI = torch.randn(33, 100, generator=torch.Generator().manual_seed(0))
    expected = QUANTIZATIONS[name].from_dense(w_OI)
    monkeypatch.setitem(base.TILE_BYTES, "cpu", 1000)
    tiled = QUANTIZATIONS[name].from_dense(w_OI)
    assert torch.equal(tiled.packed, expected.packed)
    assert torch.equal(tiled.absmax, expected.absmax)
