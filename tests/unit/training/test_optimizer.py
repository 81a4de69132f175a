"""AdamW on float32 masters."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import nn

from qdora.adapters.base import adapter_parameter
from qdora.config import TrainingConfig
from qdora.training.optimizer import AdapterOptimizer

CONFIG = TrainingConfig(max_steps=1, learning_rate=1e-3, weight_decay=0.1, beta1=0.8, beta2=0.95)


def start() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(3, 5, generator=generator).bfloat16(),
        "m": torch.randn(7, generator=generator).bfloat16(),
    }


def make(dtype) -> AdapterOptimizer:
    return AdapterOptimizer({n: adapter_parameter(t.to(dtype)) for n, t in start().items()}, CONFIG)


def gradient(step: int, name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * step + len(name) + ord(name[0]))
    return torch.randn(start()[name].shape, generator=generator)


def advance(
    optimizer: AdapterOptimizer, steps: Iterable[int], scale: float = 1.0, skip=None, factor=1.0
) -> None:
    for step in steps:
        optimizer.zero_grad()
        for name, parameter in optimizer.parameters.items():
            parameter.grad = gradient(step, name) * factor
        optimizer.step(scale * 1e-3 * (1 + step % 3), skip)


def reference(steps: int, scale: float = 1.0, **options) -> dict[str, torch.Tensor]:
    parameters = {n: nn.Parameter(t.float()) for n, t in start().items()}
    adamw = torch.optim.AdamW(parameters.values(), betas=(0.8, 0.95), weight_decay=0.1, **options)
    for step in range(steps):
        adamw.param_groups[0]["lr"] = scale * 1e-3 * (1 + step % 3)
        for name, parameter in parameters.items():
            parameter.grad = gradient(step, name)
        adamw.step()
    return {n: p.detach() for n, p in parameters.items()}


def test_float32_parameters_are_torchs_adamw():
    """Catches: betas swapped, weight decay or the schedule's rate not passed on."""
    optimizer = make(torch.float32)
    advance(optimizer, range(9))
    exact, plain = reference(9, fused=True), reference(9)
    for name, parameter in optimizer.parameters.items():
        assert torch.equal(parameter.detach(), exact[name])
        assert torch.allclose(parameter.detach(), plain[name], rtol=1e-5, atol=1e-7)


def test_bf16_parameters_are_the_rounded_float32_ones():
    """Catches: a step that starts from the rounded parameter instead of its master."""
    optimizer = make(torch.bfloat16)
    advance(optimizer, range(40))
    for name, expected in reference(40, fused=True).items():
        assert torch.equal(optimizer.parameters[name].detach(), expected.bfloat16())


def test_updates_too_small_for_bf16_add_up():
    """Catches: updates below half a bf16 spacing that vanish one by one."""
    parameter = adapter_parameter(torch.full((4,), 1.0, dtype=torch.bfloat16))
    optimizer = AdapterOptimizer({"p": parameter}, TrainingConfig(max_steps=1, learning_rate=1e-4))
    for step in range(100):
        parameter.grad = torch.ones(4)
        optimizer.step(1e-4)
        if step == 0:
            assert torch.equal(parameter.detach(), torch.ones(4).bfloat16())
    assert torch.allclose(optimizer.masters["p"].detach(), torch.full((4,), 0.99), atol=1e-5)
    assert torch.equal(parameter.detach(), torch.full((4,), 0.99).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_skipped_step_changes_nothing(dtype):
    """Catches: a step count, a moment, a master or weight decay that goes on where the gradient is no number;
    a step that is not skipped and is another one."""
    straight, other = make(dtype), make(dtype)
    advance(straight, range(3))
    for step in range(3):
        advance(other, [step], skip=torch.tensor(False))
        before = {key: tensor.clone() for key, tensor in other.state().items()}
        rounded = {name: p.detach().clone() for name, p in other.parameters.items()}
        advance(other, [7], skip=torch.tensor(True), factor=float("nan"))
        assert all(torch.equal(tensor, before[key]) for key, tensor in other.state().items())
        assert all(torch.equal(p, rounded[name]) for name, p in other.parameters.items())
    for key, tensor in straight.state().items():
        assert torch.equal(tensor, other.state()[key]), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_continues_bit_for_bit(dtype):
    """Catches: a step count, moment or master that is not saved, or shared with the one that saved it."""
    straight, first, second = make(dtype), make(dtype), make(dtype)
    advance(straight, range(8))
    advance(first, range(4))
    saved = {key: tensor.clone() for key, tensor in first.state().items()}
    advance(second, range(20, 22))
    second.load_state(saved)
    before = {key: tensor.clone() for key, tensor in saved.items()}
    advance(second, range(4, 8))
    assert all(torch.equal(tensor, before[key]) for key, tensor in saved.items())
    for key, tensor in straight.state().items():
        assert torch.equal(tensor, second.state()[key]), key


PURE = CONFIG.model_copy(update={"master_weights": False})


def without_masters(dtype, storage=None) -> AdapterOptimizer:
    return AdapterOptimizer(
        {n: adapter_parameter(t.to(dtype)) for n, t in start().items()}, PURE, storage=storage
    )


def test_without_masters_everything_is_bf16():
    """Catches: a float32 moment or master left, a gradient that is not rounded: another recipe than the one
    that is to be repeated."""
    optimizer = without_masters(torch.bfloat16)
    advance(optimizer, range(40))
    parameters = {n: nn.Parameter(t.clone()) for n, t in start().items()}
    adamw = torch.optim.AdamW(parameters.values(), betas=(0.8, 0.95), weight_decay=0.1, fused=True)
    for step in range(40):
        adamw.param_groups[0]["lr"] = 1e-3 * (1 + step % 3)
        for name, parameter in parameters.items():
            parameter.grad = gradient(step, name).bfloat16()
        adamw.step()
    with_masters = make(torch.bfloat16)
    advance(with_masters, range(40))
    for name, parameter in optimizer.parameters.items():
        assert torch.equal(parameter.detach(), parameters[name].detach())
        assert not torch.equal(parameter.detach(), with_masters.parameters[name].detach())
    own = {key: t.dtype for key, t in optimizer.state().items() if not key.startswith("step/")}
    assert set(own.values()) == {torch.bfloat16}


def test_a_small_update_is_lost_without_a_master():
    """Catches: a switch that changes nothing; this loss is what it is there to show."""
    parameter = adapter_parameter(torch.full((4,), 1.0, dtype=torch.bfloat16))
    optimizer = AdapterOptimizer({"p": parameter}, PURE.model_copy(update={"weight_decay": 0.0}))
    for _ in range(100):
        parameter.grad = torch.ones(4)
        optimizer.step(1e-4)
    assert torch.equal(parameter.detach(), torch.ones(4).bfloat16())


def test_a_float32_shard_without_masters_steps_as_its_bf16_parameter():
    """Catches: shards, which are float32, that keep what the parameter of a process alone would lose."""
    alone, shard = without_masters(torch.bfloat16), without_masters(torch.float32, torch.bfloat16)
    advance(alone, range(12))
    advance(shard, range(12))
    for name, parameter in alone.parameters.items():
        assert torch.equal(shard.parameters[name].detach(), parameter.detach().float())
    assert all(torch.equal(t, alone.state()[key]) for key, t in shard.state().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_without_masters_continues_bit_for_bit(dtype):
    """Catches: a moment that is widened on the way, a parameter that is not what was stepped; a version that
    does not count a step, by which a stale norm is known."""
    straight, first, second = (without_masters(dtype, torch.bfloat16) for _ in range(3))
    advance(straight, range(8))
    advance(first, range(4))
    advance(second, range(20, 22))
    second.load_state({key: tensor.clone() for key, tensor in first.state().items()})
    versions = {name: p._version for name, p in second.parameters.items()}
    advance(second, range(4, 8))
    assert all(p._version > versions[name] for name, p in second.parameters.items())
    assert all(torch.equal(t, second.state()[key]) for key, t in straight.state().items())
    for name, parameter in straight.parameters.items():
        assert torch.equal(parameter.detach(), second.parameters[name].detach())
    before = {name: p.detach().clone() for name, p in second.parameters.items()}
    advance(second, [7], skip=torch.tensor(True), factor=float("nan"))
    assert all(torch.equal(p, before[name]) for name, p in second.parameters.items())


@pytest.mark.parametrize("key", ["master/a", "master/m", "step/a", "exp_avg/m", "exp_avg_sq/a"])
def test_missing_and_misshapen_tensors_are_named(key):
    """Catches: a checkpoint of another adapter that is loaded in part."""
    optimizer = make(torch.bfloat16)
    advance(optimizer, range(2))
    state = optimizer.state()
    with pytest.raises(ValueError, match=f"tensor {key} is missing"):
        make(torch.bfloat16).load_state({k: v for k, v in state.items() if k != key})
    with pytest.raises(ValueError, match=rf"tensor {key} is of shape \(2,\)"):
        make(torch.bfloat16).load_state(state | {key: torch.zeros(2)})
