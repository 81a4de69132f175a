"""What a launch configuration may ask for."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator

from qdora.errors import InputError
from qdora.parallel.processes import Processes


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("ACCELERATE_USE_FSDP", "true", "FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "1", "DeepSpeed"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "mixed precision 'bf16'"),
    ],
)
def test_what_is_not_supported_is_refused(monkeypatch, variable, value, words):
    """Catches: sharding or autocast asked for and silently left out."""
    monkeypatch.setenv(variable, value)
    with pytest.raises(InputError, match=words):
        Processes.start()


def test_one_process_sums_and_gathers_its_own():
    """Catches: gradients changed, or sums rounded to float32, where there is nobody to share with."""
    processes = Processes(Accelerator(cpu=True))
    p = torch.nn.Parameter(torch.zeros(3))
    p.grad = torch.tensor([1.0, 2.0, 3.0])
    extras = processes.sum_gradients([p], torch.tensor([1 + 2**-40], dtype=torch.float64))
    assert extras.tolist() == [1 + 2**-40]
    assert p.grad.tolist() == [1.0, 2.0, 3.0]
    assert processes.gather(["a", "b"]) == ["a", "b"]
    assert processes.is_main
