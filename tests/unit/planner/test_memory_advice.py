"""Proposals for a run that does not fit: their order, and that each is true."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qdora.config import TrainingConfig
from qdora.config_file import apply_overrides
from qdora.planner import advise as memory_advice
from qdora.planner.advise import advise, mend
from qdora.planner.report import Breakdown, Estimate, Part
from qdora.planner.shorten import estimate
from qdora.planner.simulate import Launch

from .scenes import architecture, launch


def invented(architecture, launch: Launch) -> Estimate:
    """A peak that falls with everything that can be changed, quickly to be had."""
    kept = 10 - 8 // launch.training.checkpoint_every if launch.checkpointing else 10
    kept -= 1 if launch.training.offload_activations else 0
    activations = launch.micro_batch_size * launch.max_length * kept
    weights = 6000 if launch.fsdp is None else 6000 // launch.world_size
    if launch.fsdp and not launch.fsdp.reshard_after_forward:
        weights += 1000
    parts = {
        Part.ACTIVATIONS: activations,
        Part.WEIGHTS: 0 if launch.offload else weights,
        Part.ADAPTERS: 10 * launch.adapter.r,
    }
    nothing = Breakdown({})
    return Estimate(Breakdown(parts), "somewhere", nothing, nothing, {})


@pytest.fixture
def invent(monkeypatch):
    monkeypatch.setattr(memory_advice, "estimate", invented)


def advice(run: Launch, memory: int):
    now = invented(None, run)
    return {p.change.settings: p for p in advise(None, run, now, memory)}


def test_changes_come_in_the_order_in_which_to_try_them(invent):
    """Catches: a shorter example or a lower rank proposed before what leaves the run as it is, or what costs
    more before what costs less."""
    run = launch(2, sequences=8, reshard_after_forward=False)
    proposals = advice(run, memory=3600)
    assert list(proposals) == [
        "training.gradient_accumulation=8",
        "training.gradient_checkpointing=true",
        "training.gradient_checkpointing=true --set training.offload_activations=true",
        "fsdp_reshard_after_forward: true",
        "4 GPUs",
        "fsdp_offload_params: true",
        "data.max_length=8",
        "adapter.r=1",
    ]
    same = [p.change.same_run for p in proposals.values()]
    assert same.index(False) == 6


def test_the_mildest_change_that_fits_is_proposed(invent):
    """Catches: the strongest setting proposed where a mild one is enough, or one that is not enough."""
    run = launch(2, sequences=8)
    peak = invented(None, run).peak.total
    for memory, count in ((peak - 1, 2), (peak - 700, 4), (peak - 1100, 8)):
        (proposal,) = [p for name, p in advice(run, memory).items() if "accumulation" in name]
        assert proposal.change.settings == f"training.gradient_accumulation={count}"
        assert proposal.fits
        assert proposal.change.launch.micro_batch_size == 8 // count


@pytest.mark.parametrize("fixed", [0, 3000])
def test_a_large_batch_is_mended_with_one_estimate(monkeypatch, fixed):
    """Catches: an estimate of each accumulation on the way to the one that fits; one that fits passed over
    because it was held to take more than it does."""
    seen = []

    def counted(architecture, changed):
        seen.append(changed.micro_batch_size)
        held = invented(architecture, changed)
        # A part of what scales does not: the bound is below what is estimated.
        more = Breakdown({Part.ACTIVATIONS: fixed})
        return replace(held, peak=held.peak.plus(more))

    monkeypatch.setattr(memory_advice, "estimate", counted)
    run = launch(1, sequences=1024)
    now = counted(None, run)
    peaks = {n: counted(None, run.with_training(gradient_accumulation=n)).peak.total for n in (1, 4, 8, 1024)}
    seen.clear()
    proposal = mend(None, run, now, peaks[8])
    assert proposal.change.settings == "training.gradient_accumulation=8"
    assert proposal.fits
    assert seen == [128]
    # Where the bound is too low by what does not scale, the next ones are tried.
    assert mend(None, run, now, peaks[8] - 1).change.settings == "training.gradient_accumulation=16"
    assert mend(None, run, now, peaks[1024]).change.settings == "training.gradient_accumulation=1024"


def test_as_few_layers_are_recomputed_as_fit(invent):
    """Catches: each layer computed twice where every fourth is enough; a setting that is proposed again."""
    run = launch(1, sequences=8)
    peak = invented(None, run).peak.total
    for memory, every in ((peak - 1, 4), (peak - 300, 2), (peak - 600, 1)):
        (proposal,) = [
            p for p in advice(run, memory).values() if p.change.price.endswith("is computed twice")
        ]
        more = f" --set training.checkpoint_every={every}" if every > 1 else ""
        assert proposal.change.settings == "training.gradient_checkpointing=true" + more
        assert proposal.change.launch.training.checkpoint_every == every
    run = run.with_training(gradient_checkpointing=True, checkpoint_every=4)
    assert "training.checkpoint_every=1" in advice(run, 10)
    assert "training.offload_activations=true" in advice(run, 10)


def test_changes_are_put_together_where_none_is_enough(invent):
    """Catches: a user who is left with proposals of which none fits."""
    run = launch(2, sequences=8)
    memory = 100
    proposals = advice(run, memory)
    together = [p for p in proposals.values() if p.change.price == "all of these"]
    assert [p.fits for p in together] == [False, False, True]
    assert together[-1].change.settings == (
        "training.gradient_accumulation=8 --set training.gradient_checkpointing=true "
        "--set training.offload_activations=true and fsdp_offload_params: true"
    )
    assert together[-1].estimate == invented(None, together[-1].change.launch)


def test_more_gpus_keep_the_batch(invent):
    """Catches: a batch that no longer divides, or another one than the user's."""
    run = launch(2, sequences=2, accumulation=4)
    (proposal,) = [p for name, p in advice(run, 1500).items() if "GPUs" in name]
    changed = proposal.change.launch
    assert changed.training.batch_size == run.training.batch_size
    assert changed.world_size * changed.training.gradient_accumulation * changed.micro_batch_size == 16
    assert proposal.change.settings == "8 GPUs, training.gradient_accumulation=1"
    alone = advice(launch(1, sequences=2), 5000)
    assert alone["2 GPUs"].change.launch.fsdp is not None


def test_what_is_set_already_is_not_proposed(invent):
    """Catches: advice to do what was done."""
    run = launch(2, sequences=1, checkpointing=True, offload=True).with_training(offload_activations=True)
    assert [name for name in advice(run, 10) if "=true" in name or ": true" in name] == []


def test_what_training_refuses_is_not_proposed():
    """Catches: advice, or a traceback of it, that shards an init which FSDP does not know, or an odd rank."""
    model = architecture(1)
    run = launch(1, sequences=2, adapter={"targets": ("q_proj",), "init": "pissa"})
    now = estimate(model, run)
    names = [p.change.settings for p in advise(model, run, now, 0)]
    assert "training.gradient_checkpointing=true" in names
    assert not [name for name in names if "GPUs" in name]
    run = launch(1, adapter={"targets": ("q_proj",), "init": "orthogonal", "r": 4})
    names = [p.change.settings for p in advise(model, run, estimate(model, run), 0)]
    assert "adapter.r=2" in names
    assert "adapter.r=1" not in names


def test_a_proposal_is_the_estimate_of_its_launch():
    """Catches: advice whose figure is not that of the run it names."""
    model = architecture(1)
    run = launch(2, length=64, adapter={"targets": ("q_proj",)})
    now = estimate(model, run)
    first = next(advise(model, run, now, now.peak.total - 1))
    assert first.change.settings == "training.gradient_accumulation=2"
    assert first.change.launch == run.with_training(gradient_accumulation=2)
    assert first.estimate == estimate(model, first.change.launch)
    assert first.fits


def test_what_is_proposed_fits_when_it_is_set():
    """Catches: settings that say another run than the one that was estimated, or that no parser takes."""
    model = architecture(4)
    run = launch(1, length=64, sequences=2, adapter={"targets": ("q_proj",)})
    now = estimate(model, run)
    each = estimate(model, run.with_training(gradient_checkpointing=True)).peak.total
    settings = []
    for proposal in advise(model, run, now, (now.peak.total + each) // 2):
        if not proposal.change.same_run or "GPU" in proposal.change.settings:
            continue
        settings.append(proposal.change.settings)
        tree = {"training": run.training.model_dump(mode="json")}
        apply_overrides(tree, proposal.change.settings.split(" --set "))
        pasted = replace(run, training=TrainingConfig(**tree["training"]))
        assert pasted == proposal.change.launch
        assert proposal.fits == (estimate(model, pasted).peak.total <= (now.peak.total + each) // 2)
    assert any("checkpoint" in one for one in settings)
    assert any("offload" in one for one in settings)
