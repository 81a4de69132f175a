"""A PEFT model with `accelerate` under FSDP2, on two processes."""

from __future__ import annotations

import json

import pytest

from tests.distributed.ranks import ROOT, ends, fork_ranks

pytestmark = pytest.mark.distributed


def test_sharded_it_trains_as_alone_and_4_bits_are_refused(tmp_path):
    """Catches: a norm of the shards before a step; codes read without their scales, as numbers."""
    words = ["-m", "tests.distributed.accelerated", str(tmp_path)]
    for code, output in ends(fork_ranks([words] * 2, [ROOT] * 2), within=300):
        assert code == 0, output[-4000:]
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["sharded"] == pytest.approx(found["alone"], rel=1e-5)
        assert found["ours"] == 3 * 6
        assert "q_proj: its 4-bit weight has no quant_state" in found["refused"]
