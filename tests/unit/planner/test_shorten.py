"""A step of few layers, micro-batches and chunks gives what the long one gives."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qdora.planner.internals import StepTracker
from qdora.planner.report import Breakdown, Estimate, Part
from qdora.planner.shorten import estimate, layers_alike, record
from qdora.planner.simulate import record_step
from qdora.quant import Quantization

from .scenes import VOCABULARY, architecture, launch

SHORTENED = {
    "alone": launch(accumulation=2, adapter={"targets": ("down_proj",)}),
    "sharded": launch(
        2, accumulation=3, length=32, checkpointing=True, adapter={"targets": ("q_proj", "down_proj")}
    ),
    "kept": launch(2, accumulation=2, adapter={"targets": ("q_proj",)}, reshard_after_forward=False),
    "offloaded": launch(2, accumulation=2, adapter={"targets": ("q_proj",)}, offload=True),
    "dropout": launch(3, adapter={"dora": False, "dropout": 0.1, "targets": ("q_proj",), "r": 16}),
    "data parallel": launch(
        2, accumulation=2, sharded=False, adapter={"dora": False, "targets": ("down_proj",), "r": 32}
    ),
    "every second layer": launch(checkpointing=True, adapter={"targets": ("q_proj",)}).with_training(
        checkpoint_every=2
    ),
    "every third, offloaded": launch(
        2, accumulation=2, checkpointing=True, adapter={"targets": ("q_proj",)}
    ).with_training(checkpoint_every=3, offload_activations=True),
    "recomputed": launch(accumulation=2, checkpointing=True, adapter={"targets": ("q_proj", "down_proj")}),
    "joined": replace(launch(length=32, adapter={"targets": ("q_proj",)}), packing="batch"),
    "on a CPU": replace(launch(adapter={"targets": ("q_proj",), "dropout": 0.1}), device="cpu"),
    "full": launch(accumulation=2, full=True),
    "full, sharded": launch(2, accumulation=2, full=True),
}
"""Steps of which a few micro-batches, layers and chunks of the loss are run."""
OPTIMIZERS = ("adamw8bit", "paged_adamw8bit", "adafactor", "kahan_adamw", "stableadamw", "ranger", "lion")
SHORTENED |= {
    name: launch(adapter={"targets": ("q_proj",)}).with_training(
        optimizer=name, optimizer_options={"min_8bit_size": 1} if name.endswith("8bit") else {}
    )
    for name in OPTIMIZERS
}
SHORTENED |= {
    "kahan, sharded": launch(2, adapter={"targets": ("q_proj",)}).with_training(optimizer="kahan_adamw"),
    "kahan, no masters": SHORTENED["kahan_adamw"].with_training(master_weights=False),
}


def of_kinds(peak: Breakdown) -> dict[Part, int]:
    """Row norms are adapters' until the first micro-batch renews them, as activations."""
    norms = peak[Part.ADAPTERS] + peak[Part.ACTIVATIONS]
    return dict(peak) | {Part.ADAPTERS: 0, Part.ACTIVATIONS: norms}


@pytest.mark.parametrize("run", SHORTENED.values(), ids=list(SHORTENED))
def test_a_short_step_gives_the_long_one_to_the_byte(run, monkeypatch):
    """Catches: a worst moment that few layers, chunks or micro-batches do not show, a line through the
    wrong points, gradients that are not there before the last micro-batch."""
    monkeypatch.setattr("qdora.training.loss.CHUNK_BYTES", 4 * VOCABULARY * 5)  # 7 chunks, the last of 2 rows
    deep = architecture(
        9 if run.training.checkpoint_every > 1 else 7,
        quantization="none" if run.training.mode == "full" else "nf4",
    )
    assert layers_alike(deep, run)
    short, long = record(deep, run), record_step(deep.build(), run)
    assert max(p.total for p in short.peaks.values()) == max(p.total for p in long.peaks.values())
    assert dict(short.at_rest) == dict(long.at_rest)
    assert dict(short.shards) == dict(long.shards)
    assert short.exchanged == long.exchanged
    assert all(of_kinds(peak) == of_kinds(long.peaks[name]) for name, peak in short.peaks.items())
    ends = (0, 1, -1) if run.fsdp is None else (0, 1, -2, -1)
    assert {f"{kind} of layer {i}" for kind in ("forward", "backward") for i in ends} <= {
        name.partition(",")[0] for name in short.peaks
    }
    first, second = (Estimate.of(one, run.offload) for one in (short, long))
    assert dict(first.host) == dict(second.host)


def test_estimates_share_no_more_than_they_have_in_common():
    """Catches: an idle step of another run, format or optimizer taken for that of this one."""
    deep = architecture(7)
    first = launch(accumulation=2, adapter={"targets": ("q_proj",)})
    changed = [
        first.with_training(batch_size=8, gradient_accumulation=1),
        first.with_training(gradient_checkpointing=True),
        first.with_training(optimizer="sgd"),
        replace(first, adapter=first.adapter.model_copy(update={"r": 4})),
        launch(2, accumulation=2, adapter={"targets": ("q_proj",)}),
    ]
    estimate(deep, first)
    assert [estimate(deep, run) for run in changed] == [estimate(architecture(7), run) for run in changed]
    assert len(deep.idle_steps) == 4
    dense = replace(deep, quantization=Quantization("none"))
    assert estimate(dense, first) == estimate(architecture(7, quantization="none"), first)


@pytest.mark.parametrize("ranks", [1, 8])
def test_an_estimate_costs_the_same_at_any_size(monkeypatch, ranks):
    """Catches: operators for each chunk of a large batch's loss, each micro-batch or each layer, which take
    minutes for a model of billions of parameters."""
    monkeypatch.setattr("qdora.training.loss.CHUNK_BYTES", 4 * VOCABULARY * 8)
    computed = []
    compute = StepTracker._compute

    def counted(self, func, args, kwargs):
        computed.append(func)
        return compute(self, func, args, kwargs)

    monkeypatch.setattr(StepTracker, "_compute", counted)
    numbers = []
    for depth, sequences, accumulation in ((6, 2, 1), (12, 512, 1), (12, 64, 8)):
        run = launch(ranks, sequences=sequences, accumulation=accumulation, adapter={"targets": ("q_proj",)})
        computed.clear()
        estimate(architecture(depth), run)
        numbers.append(len(computed))
    assert max(numbers) < 1.1 * min(numbers)


def test_unlike_layers_are_not_taken_for_alike():
    """Catches: a rank for some layers only, extended to all of them."""
    deep = architecture(7)
    assert not layers_alike(deep, launch(adapter={"rank_pattern": {"*.layers.5.*": 4}}))
    assert not layers_alike(deep, launch(adapter={"targets": ("*.layers.0.*.q_proj",)}))
