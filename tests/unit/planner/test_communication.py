"""Bytes and operations by formula, against what a step on fake tensors sends and against closed forms."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qdora.adapters.base import describe
from qdora.planner.scaling import (
    LINKS,
    Traffic,
    at_ranks,
    collective_seconds,
    plot_efficiency,
    scale,
    schemes,
    traffic,
    work,
)
from qdora.planner.simulate import record_step

from .scenes import HIDDEN, INTERMEDIATE, KEYS, VOCABULARY, R, architecture, launch

Q = {"targets": ("q_proj",)}


@pytest.mark.parametrize(
    ("model", "run"),
    [
        (architecture(2), launch(3, accumulation=2, adapter=Q)),
        (architecture(2, tied=True), launch(2, adapter=Q, reshard_after_forward=False)),
        (architecture(1), launch(16, adapter=Q)),
    ],
    ids=["untied", "tied and kept", "more ranks than rows"],
)
def test_the_formula_is_what_a_step_sends(model, run):
    """Catches: a gather too many or too few, a padded share taken for a full one, a micro-batch forgotten."""
    moved = traffic(model, run)
    exchanged = record_step(model.build(), run).exchanged
    assert exchanged["all-gather"] == moved.gathered
    assert exchanged["reduce-scatter"] == moved.scattered


def test_gathers_of_a_layer_by_hand():
    """Catches: 16-bit weights where 4-bit ones travel, scales left behind, float32 adapters gathered."""
    moved = traffic(architecture(1), launch(2, accumulation=3, adapter=Q))
    linears = 2 * HIDDEN * HIDDEN + 2 * KEYS * HIDDEN + 3 * INTERMEDIATE * HIDDEN
    numbers = R * HIDDEN + HIDDEN * R + HIDDEN
    layer = linears // 2 + linears // 64 + 2 * numbers
    tables = 2 * (VOCABULARY + 1) * HIDDEN * 2
    assert moved == Traffic(2, 3 * (2 * layer + tables), 3 * 4 * numbers, 0, 3 * (2 + 1 + 2))
    assert moved.sent == (moved.gathered + moved.scattered) / 2


def test_data_parallel_sums_the_gradients_once_a_step():
    """Catches: a sum per micro-batch, or one process that talks to itself."""
    numbers = R * HIDDEN + HIDDEN * R + HIDDEN
    run = launch(4, accumulation=3, sharded=False, adapter=Q)
    assert traffic(architecture(1), run) == Traffic(4, 0, 0, 4 * numbers, 1)
    assert traffic(architecture(1), run).sent == 2 * 4 * numbers * 3 / 4
    assert traffic(architecture(1), launch(1, adapter=Q)).sent == 0


def test_operations_by_hand():
    """Catches: the gradient of a frozen weight counted, recomputation left out, tokens of all GPUs."""
    run = launch(2, sequences=3, length=10, adapter=Q)
    linears = 2 * HIDDEN * HIDDEN + 2 * KEYS * HIDDEN + 3 * INTERMEDIATE * HIDDEN
    factors = 2 * R * HIDDEN
    inside = 2 * linears + 2 * factors + 2 * HIDDEN * 10
    head = 2 * VOCABULARY * HIDDEN
    back = 2 * linears + 4 * factors + 4 * HIDDEN * 10
    forward, backward = work(architecture(1), run)
    assert forward == 30 * (inside + head)
    assert backward == 30 * (back + head)
    again = replace(run, training=run.training.model_copy(update={"gradient_checkpointing": True}))
    assert sum(work(architecture(1), again)) - (forward + backward) == 30 * inside


def test_the_schemes_differ_in_what_they_store_and_train():
    """Catches: a comparison of runs that differ in tokens, or of a 4-bit base with itself."""
    run = launch(2, adapter=Q)
    compared = schemes(architecture(1), run).values()
    assert [
        describe(model.quantization.name, launched.adapter, launched.training.mode)
        for model, launched in compared
    ] == ["nf4 + lora + dora", "none + lora + dora", "full"]
    sent = [traffic(model, launched) for model, launched in compared]
    assert sent[0].gathered < sent[1].gathered
    assert sent[1].scattered == sent[0].scattered < sent[2].scattered
    assert at_ranks(run, 64).micro_batch_size == run.micro_batch_size


def test_a_ring_takes_its_bytes_and_its_hops():
    """Catches: latency left out, which decides at 1024 ranks, or counted inside a node only."""
    pcie, _, infiniband = LINKS
    alone = Traffic(8, 800, 0, 0, 1)
    assert collective_seconds(alone, pcie) == pytest.approx(700 / 31.5e9 + 8.4e-6 + 7 * 5.7e-6)
    many = Traffic(16, 0, 0, 0, 10)
    assert collective_seconds(many, infiniband) == pytest.approx(10 * (8.4e-6 + 14 * 3.4e-6 + 9.6e-6))


def test_points_and_plot(tmp_path):
    """Catches: a plot that is not written, or an efficiency above 1."""
    points = scale(architecture(1), launch(2, adapter=Q), (2, 8))
    assert [(p.scheme, p.moved.ranks) for p in points][:2] == [
        ("4-bit base + adapter", 2),
        ("4-bit base + adapter", 8),
    ]
    assert all(0 < e <= 1 for p in points for e in p.efficiency.values())
    plot_efficiency(points, tmp_path / "plot.png", "a title")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
