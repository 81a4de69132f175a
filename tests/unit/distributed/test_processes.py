"""What a launch configuration may ask for."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from transformers.distributed.fsdp import is_fsdp_enabled

from qdora.distributed.context import DistributedContext
from qdora.distributed.launch import FsdpSettings
from qdora.errors import InputError


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("ACCELERATE_USE_FSDP", "true", "fsdp_version"),
        ("ACCELERATE_USE_DEEPSPEED", "1", "DeepSpeed"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "mixed precision 'bf16'"),
    ],
)
def test_what_is_not_supported_is_refused(monkeypatch, variable, value, words):
    """Catches: sharding (this FSDP is version 1) or autocast asked for and silently left out."""
    monkeypatch.setenv(variable, value)
    with pytest.raises(InputError, match=words):
        DistributedContext.from_launch()


def test_one_process_sums_and_gathers_its_own():
    """Catches: gradients changed, or sums rounded to float32, where there is nobody to share with."""
    context = DistributedContext()
    p = torch.nn.Parameter(torch.zeros(3))
    p.grad = torch.tensor([1.0, 2.0, 3.0])
    extras = context.sum_gradients([p], torch.tensor([1 + 2**-40], dtype=torch.float64))
    assert extras.tolist() == [1 + 2**-40]
    assert p.grad.tolist() == [1.0, 2.0, 3.0]
    assert context.gather(["a", "b"]) == ["a", "b"]
    assert context.is_main
    assert context.sum(torch.tensor([1 + 2**-40], dtype=torch.float64)).tolist() == [1 + 2**-40]
    assert (context.fsdp, context.mesh) == (None, None)


def test_one_process_can_be_sharded_over_itself(monkeypatch):
    """Catches: FSDP over a world of one that needs a launcher; transformers told to leave out weights."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_RESHARD_AFTER_FORWARD", "false")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    try:
        context = DistributedContext.from_launch()
        assert context.fsdp == FsdpSettings(reshard_after_forward=False)
        assert context.mesh is not None
        assert (context.mesh.size(), context.mesh.device_type) == (1, context.device.type)
        assert context.sum(torch.tensor([3.0], dtype=torch.float16)).tolist() == [3.0]
        assert not is_fsdp_enabled()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
