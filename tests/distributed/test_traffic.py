"""What real sharded steps hold and send, against what is estimated without them.  One spawn for all cases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qdora.models.formats.safetensors import read_config
from qdora.planner.architecture import Architecture
from qdora.planner.scaling import traffic
from qdora.planner.simulate import record_step
from qdora.quant import Quantization
from tests.distributed.ranks import ROOT, ends, fork_ranks
from tests.distributed.traffic import CASES, GATHER, SCATTER, launch_of
from tests.tiny import write_tiny_model

pytestmark = pytest.mark.distributed
COUNT = 3
"""Divides no side of the model."""
SLACK = 32 * 4 * 40
"""A batch is put together, its labels are found by their indices: a few numbers a token."""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_tiny_model(
        tmp_path_factory.mktemp("models") / "untied", tie_word_embeddings=False, vocab_size=302
    )


@pytest.fixture(scope="module")
def counted(model, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("counted")
    words = ["-m", "tests.distributed.traffic", str(out), str(model)]
    # Estimates are of torch's operators: without a compiler nothing else computes.
    settings = {"ACCELERATE_USE_CPU": "true", "QDORA_TIMEOUT": "300", "CXX": "none"}
    started = fork_ranks([words] * COUNT, [ROOT] * COUNT, **settings)
    for code, output in ends(started, within=400):
        assert code == 0, output[-6000:]
    return out


def facts(counted: Path, case: str, rank: int) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((counted / f"{case}-{rank}.json").read_text())
    return facts


def architecture(model: Path, case: str) -> Architecture:
    quantization = Quantization(CASES[case].quantization)
    return Architecture(read_config(model), torch.float32, torch.bfloat16, quantization)


@pytest.mark.parametrize("case", CASES)
def test_the_formula_is_what_the_processes_exchange(counted, model, case):
    """Catches: a gather that is not counted or made for nothing, gradients of frozen weights on the way,
    shards that are not padded, a micro-batch forgotten."""
    moved = traffic(architecture(model, case), launch_of(CASES[case], COUNT))
    for rank in range(COUNT):
        got = facts(counted, case, rank)["exchanged"]
        assert got.get("all-gather", 0) == moved.gathered
        assert got.get("reduce-scatter", 0) == moved.scattered
        # The loss, and the norm of each gradient, are summed as well.
        assert 0 <= got["all-reduce"] - moved.summed < 1000
        calls = facts(counted, case, rank)["calls"]
        assert calls.get(GATHER, 0) == moved.gathered
        assert calls.get(SCATTER, 0) == moved.scattered


@pytest.mark.parametrize("case", CASES)
def test_the_first_rank_holds_what_was_estimated(counted, model, case):
    """Catches: fakes that shard, gather or free otherwise than the processes do."""
    launch = launch_of(CASES[case], COUNT)
    fake = record_step(architecture(model, case).build(), launch)
    real = facts(counted, case, 0)
    assert {part.value: size for part, size in fake.at_rest.items()} == real["at_rest"]
    # Gloo may hold on to a table that it has just moved for a moment longer than anybody needs it.
    table = 4 * -(-302 // COUNT) * COUNT * 64
    exact = 0
    for stretch, peak in fake.peaks.items():
        more = real["peaks"][stretch] - peak.total
        assert -SLACK <= more <= SLACK + table, stretch
        exact += abs(more) <= SLACK
    assert exact >= 0.7 * len(fake.peaks)


@pytest.mark.parametrize("case", [name for name, case in CASES.items() if case.fsdp is not None])
def test_no_rank_holds_more_than_the_first(counted, case):
    """Catches: an estimate of a rank that is not the fullest."""
    totals = [sum(facts(counted, case, rank)["at_rest"].values()) for rank in range(COUNT)]
    assert max(totals) == totals[0] > totals[-1]
