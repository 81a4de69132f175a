"""A step on fake tensors: what it holds, kind by kind, against closed forms."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from qdora.adapters.inject import inject
from qdora.adapters.kernels import native
from qdora.distributed.context import DistributedContext
from qdora.distributed.launch import FsdpSettings
from qdora.errors import InputError
from qdora.models.load import load_base
from qdora.planner.architecture import Architecture
from qdora.planner.report import Breakdown, Part, StepRecord
from qdora.planner.shorten import estimate
from qdora.planner.simulate import OPTIMIZER, UPDATE, record_step
from qdora.quant import QUANTIZATIONS, Quantization
from qdora.quant.base import TILE_BYTES
from qdora.training.loss import CHUNK_BYTES
from tests.real_step import record_real_step
from tests.tiny import write_tiny_model

from .scenes import HIDDEN, INTERMEDIATE, KEYS, VOCABULARY, R, architecture, launch

LAYERS = 2
LINEARS = [
    (HIDDEN, HIDDEN),
    (KEYS, HIDDEN),
    (KEYS, HIDDEN),
    (HIDDEN, HIDDEN),
    (INTERMEDIATE, HIDDEN),
    (INTERMEDIATE, HIDDEN),
    (HIDDEN, INTERMEDIATE),
]
"""(out, in) of the linear layers of a decoder layer."""


def own(rows: int, ranks: int) -> int:
    """Rows of the largest shard."""
    return -(-rows // ranks)


BITS = {"nf4": 4, "fp4": 4, "int8": 8, "nf3": 8, "nf2": 8, "none": 16}
"""Of a weight in each format, as it is stored."""


def weights(ranks: int, bits: int = 4) -> int:
    packed = sum(own(o, ranks) * i * bits // 8 for o, i in LINEARS) * LAYERS
    tables = 2 * own(VOCABULARY, ranks) * HIDDEN * 2
    vectors = (2 * LAYERS + 1) * HIDDEN * 2
    return packed + tables + vectors


def statistics(ranks: int) -> int:
    blocks = [o * i // 64 for o, i in LINEARS]
    nested = sum(-(-b // 256) * 4 + 256 * 4 + 4 for b in blocks)
    return LAYERS * (sum(own(b, ranks) for b in blocks) + nested)


def trained(ranks: int) -> int:
    """Numbers of A, B and the magnitude's offset that a process holds."""
    return LAYERS * sum(own(R, ranks) * i + own(o, ranks) * R + own(o, ranks) for o, i in LINEARS)


def vectors() -> int:
    """Bytes of the magnitude's frozen start and of the row norms, which every process has whole."""
    return 2 * 4 * LAYERS * sum(o for o, _ in LINEARS)


@pytest.mark.parametrize("ranks", [1, 3])
def test_what_stays_is_the_sum_of_the_tensors(ranks):
    """Catches: a full tensor for a shard, statistics counted as weights, 16-bit shards of trained
    parameters, masters where a shard is one, moments that the first step has yet to make."""
    at_rest = estimate(architecture(LAYERS), launch(ranks)).at_rest
    numbers = trained(ranks)
    parameters = 7 * 3 * LAYERS
    assert at_rest[Part.WEIGHTS] == weights(ranks)
    assert at_rest[Part.STATISTICS] == statistics(ranks)
    assert at_rest[Part.ADAPTERS] == numbers * (4 if ranks > 1 else 2) + vectors()
    assert at_rest[Part.OPTIMIZER] == numbers * (8 if ranks > 1 else 12) + 4 * parameters
    assert (
        at_rest.total - sum(at_rest[p] for p in list(Part)[:5] if p is not Part.GRADIENTS)
        == at_rest[Part.OTHER]
    )
    assert at_rest[Part.OTHER] < 1000


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_frozen_magnitude_and_steps_without_masters_are_estimated(ranks):
    """Catches: an offset that is not there counted with its moments, a start that the estimate cannot make,
    masters and float32 moments counted where there are none."""
    run = launch(ranks, adapter={"magnitude": "frozen", "magnitude_start": "original"})
    at_rest = estimate(architecture(LAYERS), run.with_training(master_weights=False)).at_rest
    numbers = trained(ranks) - LAYERS * sum(own(o, ranks) for o, _ in LINEARS)
    parameters = 7 * 2 * LAYERS
    assert at_rest[Part.ADAPTERS] == numbers * (4 if ranks > 1 else 2) + vectors()
    # A shard is float32, so what is stepped stands beside it in bf16; alone it is the parameter itself.
    assert at_rest[Part.OPTIMIZER] == numbers * (6 if ranks > 1 else 4) + 4 * parameters


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_a_weight_takes_the_bits_of_its_format(name, ranks):
    """Catches: a format that cannot be estimated, or whose codes are taken for one a byte."""
    run = launch(ranks, adapter={"targets": ("q_proj",)})
    at_rest = estimate(architecture(LAYERS, quantization=name), run).at_rest
    assert at_rest[Part.WEIGHTS] == weights(ranks, BITS[name])
    assert at_rest[Part.STATISTICS] == (0 if name == "none" else statistics(ranks))


@pytest.mark.parametrize("ranks", [1, 3])
def test_full_fine_tuning_holds_every_weight_as_trained(ranks):
    """Catches: a mode that the estimate does not know, 16-bit shards, weights counted twice."""
    shapes = [(own(o, ranks), i) for o, i in LINEARS] * LAYERS + 2 * [(own(VOCABULARY, ranks), HIDDEN)]
    shapes += (2 * LAYERS + 1) * [(own(HIDDEN, ranks), 1)]
    numbers = sum(o * i for o, i in shapes)
    at_rest = estimate(architecture(LAYERS, quantization="none"), launch(ranks, full=True)).at_rest
    assert at_rest[Part.ADAPTERS] == numbers * (4 if ranks > 1 else 2)
    assert at_rest[Part.OPTIMIZER] == numbers * (8 if ranks > 1 else 12) + 4 * len(shapes)
    assert at_rest[Part.WEIGHTS] == at_rest[Part.STATISTICS] == 0
    with pytest.raises(InputError, match="needs an unquantized base"):
        estimate(architecture(LAYERS), launch(ranks, full=True))


@pytest.fixture(scope="module")
def accumulated() -> StepRecord:
    """Two processes, three micro-batches each."""
    return record_step(architecture(LAYERS).build(), launch(2, accumulation=3))


def test_kinds_add_up_to_the_total(accumulated):
    """Catches: a tensor that belongs to two kinds or to none, a kind that falls below nothing."""
    for peak in accumulated.peaks.values():
        assert peak.total == sum(peak.values())
        assert all(size >= 0 for size in peak.values())
    assert max(peak.total for peak in accumulated.peaks.values()) > accumulated.at_rest.total


def test_a_second_micro_batch_finds_the_gradients_of_the_first(accumulated):
    """Catches: gradients forgotten between micro-batches, or counted while there are none."""
    starts = {name: peak for name, peak in accumulated.peaks.items() if name.startswith("start")}
    assert [peak[Part.GRADIENTS] for peak in starts.values()] == [0, 4 * trained(2)]


def test_logits_are_those_of_a_chunk(monkeypatch):
    """Catches: logits of the whole batch at once, or of none because a mask cannot be read."""
    monkeypatch.setattr("qdora.training.loss.CHUNK_BYTES", 4 * VOCABULARY * 10)
    step = record_step(architecture(LAYERS).build(), launch(sequences=2, length=16))
    logits = step.peaks["loss, micro-batch 0"][Part.LOGITS]
    # 10 rows, in bf16 once, in float32 as what they are and as what the loss makes of them.
    assert 10 * VOCABULARY * 10 <= logits <= 10 * VOCABULARY * 20
    assert CHUNK_BYTES > 4 * VOCABULARY * 30


def test_checkpointing_keeps_one_tensor_a_layer():
    """Catches: a setting of the configuration or of the launch that does not reach the model."""
    run = launch(2, length=64, adapter={"targets": ("q_proj",)})
    asked = replace(run, fsdp=FsdpSettings(activation_checkpointing=True))
    plain, kept = (estimate(architecture(LAYERS), one).peak for one in (run, asked))
    assert kept[Part.ACTIVATIONS] < 0.8 * plain[Part.ACTIVATIONS]


def test_fewer_recomputed_layers_keep_more():
    """Catches: every k-th layer taken for each, or for none."""
    run = launch(length=64, checkpointing=True, adapter={"targets": ("q_proj",)})
    held = [
        estimate(architecture(4), one).peak[Part.ACTIVATIONS]
        for one in (
            run,
            run.with_training(checkpoint_every=2),
            run.with_training(gradient_checkpointing=False),
        )
    ]
    # Of four layers that keep theirs two are recomputed, or all, of which one at a time has its own.
    of_one = (held[2] - held[0]) / 3
    assert held[1] == pytest.approx(held[0] + 2 * of_one, abs=of_one)


@pytest.mark.parametrize("every", [1, 2])
def test_offloaded_inputs_are_in_cpu_memory(every):
    """Catches: inputs of layers on the GPU and in CPU memory, in both or in none; of layers that keep
    what they have."""
    run = launch(length=64, checkpointing=True, adapter={"targets": ("q_proj",)})
    run = run.with_training(checkpoint_every=every)
    layers, bytes_of_one = 4, 2 * 64 * HIDDEN * 2
    here, away = (
        estimate(architecture(layers), one) for one in (run, run.with_training(offload_activations=True))
    )
    assert here.host.total == 0
    assert away.host == Breakdown({Part.OFFLOADED: layers // every * bytes_of_one})
    assert away.peak[Part.OFFLOADED] == 0
    saved = here.peak.total - away.peak.total
    assert (layers // every - 1) * bytes_of_one <= saved <= layers // every * bytes_of_one


def test_offloaded_shards_are_in_cpu_memory():
    """Catches: an offload that is not seen, or host memory counted on the GPU."""
    here = estimate(architecture(LAYERS), launch(2))
    away = estimate(architecture(LAYERS), launch(2, offload=True))
    assert here.host.total == 0
    norms = (2 * LAYERS + 1) * HIDDEN * 2
    nested = LAYERS * sum(-(-o * i // 64 // 256) * 4 + 256 * 4 + 4 for o, i in LINEARS)
    assert away.host[Part.WEIGHTS] == weights(2) - norms
    assert away.host[Part.STATISTICS] == statistics(2) - nested
    assert away.host[Part.ADAPTERS] == 4 * trained(2)
    assert away.host[Part.OPTIMIZER] == here.at_rest[Part.OPTIMIZER]
    # What every rank has whole stays where it computes.
    assert away.peak[Part.WEIGHTS] == away.at_rest[Part.WEIGHTS] == norms
    assert away.peak[Part.STATISTICS] == nested
    assert away.peak[Part.ADAPTERS] >= vectors() // 2  # the norms are made anew in the pass
    assert away.peak[Part.OPTIMIZER] == 0
    assert away.peak[Part.GATHERED] > 0


@pytest.mark.parametrize(
    ("quantization", "adapter", "checkpointing"),
    [
        ("nf4", {}, False),
        ("nf4", {"targets": ("q_proj",)}, "joined"),
        ("nf4", {}, True),
        ("fp4", {"type": "none"}, False),
        ("int8", {"init": "pissa"}, False),
        ("none", {"type": "vera", "r": 64}, False),
        ("nf4", {"norm_gradient": "exact", "init": "orthogonal"}, False),
        ("nf4", {}, "offloaded"),
    ],
)
def test_fakes_hold_what_real_tensors_hold(tmp_path, quantization, adapter, checkpointing, monkeypatch):
    """Catches: an operation that makes other tensors of fakes: a mask of T x T, keys repeated for it, a
    worst batch that training would not see; a start that fakes do not have."""
    # An estimate is of torch's operators; the compiled functions take a little less.
    monkeypatch.setattr(native, "_library", lambda: None)
    joined = checkpointing == "joined"
    run = launch(
        length=48, accumulation=2, checkpointing=checkpointing in (True, "offloaded"), adapter=adapter
    )
    run = run.with_training(offload_activations=checkpointing == "offloaded")
    run = replace(run, device="cpu", packing="batch" if joined else "none")
    folder = write_tiny_model(tmp_path / "tiny")
    model, _ = load_base(str(folder), quantization=quantization, dtype="float32", device="cpu")
    base = Architecture(model.config, torch.float32, torch.bfloat16, Quantization(quantization))
    fake = record_step(base.build(), run)
    inject(model, run.adapter)
    real = record_real_step(model, run, DistributedContext())
    assert dict(fake.at_rest) == dict(real.at_rest)
    for name, peak in fake.peaks.items():
        # A batch is put together, its labels are found by their indices: a few numbers a token.
        assert peak.total == pytest.approx(real.peaks[name].total, abs=32 * 2 * 48), name
    assert max(p.total for p in fake.peaks.values()) > 1.5 * fake.at_rest.total
    batch = fake.peaks["start, micro-batch 1"][Part.OTHER] - fake.at_rest[Part.OTHER]
    assert batch >= 2 * 8 * 2 * 48  # ids and labels


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_joined_sequences_take_as_much_as_padded_ones_of_the_greatest_length(device):
    """Catches: a worst batch of joined sequences with a mask of all their tokens, rows that hold another
    number of tokens, a kernel for sequences of any lengths that fakes do not know."""
    run = replace(launch(sequences=4, length=128, adapter={"targets": ("q_proj",)}), device=device)
    plain, joined, filled = (
        record_step(architecture(LAYERS).build(), replace(run, packing=packing))
        for packing in ("none", "batch", "stream")
    )
    peaks = [max(p.total for p in one.peaks.values()) for one in (plain, joined, filled)]
    assert peaks[1] == peaks[2]
    assert peaks[1] == pytest.approx(peaks[0], rel=0.05)
    assert dict(joined.at_rest) == dict(plain.at_rest)


def test_the_update_makes_nothing_of_its_own():
    """Catches: the fakes by which DTensor finds the shape of a result, taken for memory."""
    # Sides that no other test has: shapes that were found once are not looked for again.
    step = record_step(architecture(1).build(), launch(2, adapter={"r": 13, "targets": ("down_proj",)}))
    assert all(step.peaks[phase][Part.ACTIVATIONS] < 1000 for phase in (UPDATE, OPTIMIZER))


def test_nothing_is_left_behind():
    """Catches: a process group, a tile size or an exception hook of the fake launch that outlives it."""
    before = dict(TILE_BYTES), sys.excepthook, torch.UntypedStorage.resize_
    uneven = replace(launch(2), training=launch(1, sequences=3).training)
    with pytest.raises(InputError, match="does not divide over 2 processes x 1 micro-batches"):
        estimate(architecture(1), uneven)
    estimate(architecture(1), launch(2))
    assert (dict(TILE_BYTES), sys.excepthook, torch.UntypedStorage.resize_) == before
    assert not dist.is_initialized()
