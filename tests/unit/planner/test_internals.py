"""The private names of torch and transformers that `qdora.planner.internals` takes, one by one."""

from __future__ import annotations

import inspect
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._guards import active_fake_mode
from torch.distributed._tools.mem_tracker import MemTracker, _UpdateType
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from transformers import LlamaForCausalLM, masking_utils

from qdora.distributed.fsdp import parameter_groups
from qdora.distributed.launch import FsdpSettings
from qdora.planner.internals import (
    CPU,
    StepTracker,
    fake_ranks,
    fake_tensors,
    in_backward,
    real_tensors,
    replaced,
)
from qdora.planner.report import Breakdown, Part
from qdora.quant import QUANTIZATIONS, Quantization
from qdora.quant.base import TILE_BYTES
from tests.distributed.traffic import GATHER, SCATTER
from tests.tiny import tiny_config


def held(tracker: StepTracker) -> dict[Part, int]:
    return {part: size for part, size in tracker.current.items() if size}


def test_fake_tensors_have_no_numbers_and_a_device():
    """Catches: another constructor of `FakeTensorMode`, real tensors that it refuses, a fake on `meta`."""
    real = torch.ones(3)
    with fake_tensors():
        fake = torch.empty(1 << 40)
        assert (fake.device, fake.is_meta) == (CPU, False)
        assert (real + torch.ones(3)).shape == (3,)
        with real_tensors():
            assert active_fake_mode() is None
            assert torch.ones(2).sum().item() == 2
        assert active_fake_mode() is not None
    assert active_fake_mode() is None


def test_the_tracker_follows_storages():
    """Catches: a private method of `MemTracker` that is gone, renamed, or sees a storage otherwise."""
    with fake_tensors(), StepTracker(11) as tracker:
        tracker.begin("a")
        x = torch.empty(100)
        view = x[:50]
        y = torch.empty(5, 11)
        assert held(tracker) == {Part.ACTIVATIONS: 400, Part.LOGITS: 220}
        tracker.mark([x], Part.WEIGHTS)
        z = torch.empty(10)
        tracker.mark_rest(Part.ADAPTERS)
        tracker.mark([view], Part.WEIGHTS)
        assert held(tracker) == {Part.WEIGHTS: 400, Part.ADAPTERS: 260}
        tracker.begin("b")
        del y, z
        x.untyped_storage().resize_(40)
        assert held(tracker) == {Part.WEIGHTS: 40}
        assert {name: peak.total for name, peak in tracker.peaks.items()} == {"a": 660, "b": 660}
        del x, view
        assert tracker.current == Breakdown({})
        tracker.restart()
        assert tracker.peaks == {}
    assert _UpdateType.REF.name == "REF"
    assert inspect.signature(MemTracker._update_snap).parameters.keys() >= {"u_type", "winfo", "old_reftype"}


def test_fakes_are_answered_for():
    """Catches: a number asked of a tensor without numbers."""
    with fake_tensors(), StepTracker(11):
        assert float(torch.empty(())) == 1


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_tiles_are_told_from_other_tensors(name):
    """Catches: a format whose tiles, or a kernel whose tensors, are taken for activations."""
    with fake_tensors(), StepTracker(11) as tracker:
        weight = Quantization(name).from_dense(torch.empty(8, 64, dtype=torch.bfloat16))
        x = torch.empty(5, 64)
        tracker.mark_rest(Part.WEIGHTS)
        for _, w_tile in weight.tiles(torch.float32):
            y = x @ w_tile.T
            assert held(tracker)[Part.TILES] >= 4 * 8 * 64
            assert held(tracker)[Part.ACTIVATIONS] == y.numel() * 4
    # Nothing that an estimate made is left in a cache: a real weight comes back.
    w_OI = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    again = Quantization(name).from_dense(w_OI).dense()
    assert type(again) is torch.Tensor
    # The codes of the study formats are further apart: 0.47 and 1 of a block's scale.
    assert (again - w_OI).abs().max() < {"nf3": 1.0, "nf2": 2.0}.get(name, 0.5)


def test_backward_is_known():
    """Catches: another way to ask autograd whether it runs."""
    x = torch.ones(3, requires_grad=True)
    seen = []
    x.register_hook(lambda gradient: seen.append(in_backward()))
    x.sum().backward()
    assert seen == [True]
    assert not in_backward()


def test_a_replaced_attribute_comes_back():
    """Catches: an attribute of a class left on its object, or lost with an error."""

    class Owner:
        kind = "class"

    owner = Owner()
    with pytest.raises(ZeroDivisionError), replaced(owner, "kind", "object"):
        _ = len(owner.kind) / 0
    assert vars(owner) == {}
    with replaced(Owner, "kind", "other"):
        assert owner.kind == "other"
    assert owner.kind == "class"


def test_fake_ranks_exchange_nothing_and_leave_nothing():
    """Catches: a fake process group that waits, a first rank that is another, a global that stays changed."""
    before = sys.excepthook, dict(TILE_BYTES), masking_utils.is_tracing
    with fake_ranks(5, FsdpSettings(), "cuda") as context:
        assert (context.rank, context.world_size, context.shard.world_size) == (0, 5, 5)
        assert (dist.get_rank(), dist.get_world_size()) == (0, 5)
        assert TILE_BYTES["cpu"] == TILE_BYTES["cuda"]
        with fake_tensors(), StepTracker(11) as tracker:
            dist.all_reduce(torch.empty(7))
            getattr(dist, GATHER)(torch.empty(50), torch.empty(10))
            getattr(dist, SCATTER)(torch.empty(10), torch.empty(50))
        assert tracker.exchanged == {"all-reduce": 28, "all-gather": 200, "reduce-scatter": 200}
    assert (sys.excepthook, dict(TILE_BYTES), masking_utils.is_tracing) == before
    assert not dist.is_initialized()


def test_no_mask_of_all_pairs_is_made():
    """Catches: transformers that take fake tensors for a traced graph in another place."""
    with torch.device("meta"):
        model = LlamaForCausalLM(tiny_config(num_hidden_layers=1)).model
    model = model.to_empty(device="cpu")
    length, seen = 97, []
    model.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    for ranks in (fake_ranks(1, None, "cpu"), replaced(masking_utils, "is_tracing", lambda *_: True)):
        with ranks, fake_tensors(), StepTracker(11):
            model(input_ids=torch.zeros(1, length, dtype=torch.int64), use_cache=False)
    assert seen[0] is None
    assert seen[1].shape[-2:] == (length, length)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_buffers_of_fsdp_are_known(device):
    """Catches: a method of FSDP's parameter group, or an attribute of its parameters, that has moved."""
    with fake_ranks(2, FsdpSettings(offload=True), device) as context:
        model = nn.Linear(6, 4, bias=False, device="meta")
        fully_shard(model, mesh=context.mesh)
        with fake_tensors(), StepTracker(11) as tracker:
            model.to_empty(device="cpu")
            tracker.follow_fsdp(model)
            tracker.mark_rest(Part.WEIGHTS)
            assert held(tracker) == {Part.WEIGHTS: 48}
            x = torch.empty(3, 6)
            tracker.begin("forward")
            loss = model(x).sum()
            # What all ranks sent, and the full tensor.
            assert tracker.peaks["forward"][Part.GATHERED] == 96 + 96
            loss.backward()
            (group,) = parameter_groups(model)
            before = tracker.current.total
            (sent,) = group.fsdp_params[0].all_gather_inputs
            assert tracker.current.total - before == (48 if device == "cuda" else 0)
            assert sent.shape == (12,)
            assert [p.sharded_param.grad.to_local().shape for p in group.fsdp_params] == [(2, 6)]
            assert held(tracker)[Part.GRADIENTS] == 48
        assert not {"unshard", "wait_for_unshard", "post_backward"} & vars(group).keys()
    assert isinstance(vars(FSDPParam)["all_gather_inputs"], property)


def test_shapes_of_shards_are_found_without_memory():
    """Catches: the full fake tensors by which DTensor finds the shape of a result, taken for memory."""
    assert "_propagate_tensor_meta_non_cached" in vars(ShardingPropagator)
    with fake_ranks(2, FsdpSettings(), "cpu") as context, fake_tensors(), StepTracker(11) as tracker:
        local = torch.empty(1009, 3)
        x = DTensor.from_local(local, context.mesh, [Shard(0)], run_check=False)
        tracker.begin("sum")
        y = x + x
        assert tracker.peaks["sum"].total == 2 * 4 * 1009 * 3
        assert y.shape == (2018, 3)
