"""`fully_shard` over parameters of integers, which torch before 2.12 refuses."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from qdora.distributed.fsdp import IntegersTakeNoGradients, integer_shards, parameter_groups
from qdora.distributed.launch import FsdpSettings
from qdora.planner.internals import fake_ranks


def coded() -> nn.Module:
    module = nn.Module()
    module.codes = nn.Parameter(torch.arange(10, dtype=torch.uint8), requires_grad=False)
    module.scale = nn.Parameter(torch.ones(4))
    return module


def test_codes_are_sharded_beside_trained_parameters():
    """Catches: codes that FSDP refuses or rounds, a trained parameter that loses its gradient."""
    module = coded()
    with fake_ranks(2, FsdpSettings(), "cpu") as context:
        with integer_shards():
            fully_shard(module, mesh=context.mesh)
        codes, scale = module.codes, module.scale
        assert isinstance(codes, DTensor)
        assert codes.to_local().tolist() == [0, 1, 2, 3, 4]
        assert (codes.dtype, codes.requires_grad) == (torch.uint8, False)
        assert (scale.dtype, scale.requires_grad) == (torch.float32, True)
        (group,) = parameter_groups(module)
        assert [p.sharded_param for p in group.fsdp_params] == [codes, scale]


def test_torch_is_changed_where_it_must_be():
    """Catches: a release of torch that needs help and gets none, or gets it without need."""
    with fake_ranks(2, FsdpSettings(), "cpu") as context:
        if isinstance(integer_shards(), nullcontext):
            fully_shard(coded(), mesh=context.mesh)
        else:
            with pytest.raises(RuntimeError, match="floating point"):
                fully_shard(coded(), mesh=context.mesh)


def test_integers_alone_take_no_gradients():
    """Catches: trained parameters that require no gradients either, gradients that cannot be taken back."""
    with IntegersTakeNoGradients():
        assert not torch.arange(3).requires_grad_().requires_grad
        x = torch.ones(3).requires_grad_()
        assert x.requires_grad
        assert not x.requires_grad_(False).requires_grad
