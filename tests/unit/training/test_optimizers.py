"""Optimizers by name: what they compute, exact continuation, rates of their own, what is refused."""

from __future__ import annotations

from typing import get_args

import bitsandbytes
import optimi
import pytest
import torch
from torch import nn

from qdora.adapters.base import adapter_parameter
from qdora.config import AdapterConfig, TrainingConfig
from qdora.config.run import OptimizerName
from qdora.errors import InputError
from qdora.training.optimizer import AdapterOptimizer
from qdora.training.optimizers import OPTIMIZERS, check_optimizer

from .checkpoints import read_checkpoint, write_checkpoint
from .trainers import make_trainer, parameters, run

CPU = torch.device("cpu")
HERE = [name for name, kind in OPTIMIZERS.items() if not kind.cuda_only]
"""Optimizers that a CPU has."""
OPTIONS = {
    "sgd": {"momentum": 0.9, "nesterov": True},
    "rmsprop": {"momentum": 0.5, "centered": True},
    "adamw8bit": {"min_8bit_size": 16},  # otherwise small tensors keep float32 moments
    "ranger": {"k": 3},
}
SHAPES = {"q.update.a_RI": (3, 300), "q.update.b_OR": (40, 3), "q.magnitude.offset_O": (40,)}


def make(name, dtype=torch.float32, rate_ratio=lambda name: 1.0, **training) -> AdapterOptimizer:
    options = {"optimizer": name, "optimizer_options": OPTIONS.get(name, {})} | training
    config = TrainingConfig(max_steps=9, learning_rate=1e-2, weight_decay=0.1, **options)
    generator = torch.Generator().manual_seed(0)
    start = {n: torch.randn(*shape, generator=generator) for n, shape in SHAPES.items()}
    return AdapterOptimizer(
        {n: adapter_parameter(t.to(dtype)) for n, t in start.items()}, config, rate_ratio=rate_ratio
    )


def advance(optimizer: AdapterOptimizer, steps, skip=None) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in optimizer.parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step(1e-2 / (1 + step), skip)


def same(one: AdapterOptimizer, other: AdapterOptimizer) -> bool:
    ours, theirs = one.state(), other.state()
    equal = all(torch.equal(t, theirs[key]) and t.dtype == theirs[key].dtype for key, t in ours.items())
    return (
        ours.keys() == theirs.keys()
        and equal
        and all(torch.equal(p, other.parameters[n]) for n, p in one.parameters.items())
    )


def test_the_configuration_names_the_table():
    """Catches: an optimizer that can be named and is not there, or the other way round."""
    assert set(get_args(OptimizerName)) == set(OPTIMIZERS)
    for name, kind in OPTIMIZERS.items():
        assert not {"params", "lr", "weight_decay", "foreach"} & set(kind.options()), name


@pytest.mark.parametrize("masters", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", HERE)
def test_it_goes_on_bit_for_bit(tmp_path, name, dtype, masters):
    """Catches: a moment, a count of steps, a slow copy or a compensation that is lost on the way through a
    checkpoint, or begins anew; a state whose names depend on whether a step was made."""
    if dtype == torch.float32 and not masters:
        pytest.skip("masters are for 16 bits")
    straight, first, second = (make(name, dtype, master_weights=masters) for _ in range(3))
    names = {key: tensor.shape for key, tensor in first.state().items()}
    advance(straight, range(9))
    advance(first, range(4))
    assert {key: tensor.shape for key, tensor in first.state().items()} == names
    write_checkpoint(tmp_path, 4, first.state(), {})
    before = {n: p.detach().clone() for n, p in second.parameters.items()}
    found = read_checkpoint(tmp_path / "step-4", second.state(), {})
    assert all(torch.equal(p, before[n]) for n, p in second.parameters.items())
    advance(second, range(20, 22))
    second.load_state(found.tensors)
    assert same(second, first)
    advance(second, range(4, 9))
    assert same(second, straight)
    start = make(name, dtype).parameters
    assert not any(torch.equal(p, start[n]) for n, p in straight.parameters.items())


@pytest.mark.parametrize("name", HERE)
def test_a_skipped_step_changes_nothing(name):
    """Catches: a count or a moment that takes a step whose loss is no number."""
    one, other = make(name), make(name)
    advance(one, range(2))
    advance(other, range(2), skip=torch.tensor(False))
    advance(other, [5], skip=torch.tensor(True))
    assert same(one, other)


LIBRARIES = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1, weight_decay=0.1, momentum=0.9, nesterov=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1, weight_decay=0.1),
    "adamw8bit": lambda p: bitsandbytes.optim.AdamW8bit(
        p, lr=1, weight_decay=0.1, betas=(0.9, 0.999), min_8bit_size=16
    ),
    "kahan_adamw": lambda p: optimi.AdamW(p, lr=1, weight_decay=0.1, betas=(0.9, 0.999)),
    "stableadamw": lambda p: optimi.StableAdamW(p, lr=1, weight_decay=0.1, betas=(0.9, 0.999), triton=False),
    "lion": lambda p: optimi.Lion(p, lr=1, weight_decay=0.1),
}


@pytest.mark.parametrize("name", LIBRARIES)
def test_it_is_the_librarys(name):
    """Catches: betas, weight decay, options or the schedule's rate that do not reach the optimizer."""
    ours, copy = make(name), make(name)
    advance(ours, range(5))
    theirs = {n: nn.Parameter(p.detach().clone()) for n, p in copy.parameters.items()}
    optimizer = LIBRARIES[name](list(theirs.values()))
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        for parameter in theirs.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)
        optimizer.step()
    assert all(torch.equal(p, theirs[n]) for n, p in ours.parameters.items())


@pytest.mark.parametrize("name", ["adamw", "lion", "adamw8bit"])
def test_rates_of_their_own_are_groups(name):
    """Catches: LoRA+ that scales A or the moments instead of the rate of B; a ratio lost on resume."""
    adapter = AdapterConfig(b_rate_ratio=16, magnitude_rate_ratio=0.25)
    ours = make(name, rate_ratio=adapter.rate_ratio)
    advance(ours, range(3))
    resumed = make(name, rate_ratio=adapter.rate_ratio)
    resumed.load_state({key: tensor.clone() for key, tensor in ours.state().items()})
    advance(ours, range(3, 6))
    advance(resumed, range(3, 6))
    assert same(ours, resumed)
    theirs = {n: nn.Parameter(p.detach().clone()) for n, p in make(name).parameters.items()}
    a, b, m = theirs.values()
    groups = [{"params": [a]}, {"params": [b]}, {"params": [m]}]
    if name == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=1, weight_decay=0.1, fused=True)
    else:
        optimizer = LIBRARIES[name](groups)
    for step in range(6):
        generator = torch.Generator().manual_seed(step)
        for parameter in theirs.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for group, ratio in zip(optimizer.param_groups, (1, 16, 0.25), strict=True):
            group["lr"] = 1e-2 / (1 + step) * ratio
        optimizer.step()
    assert all(torch.equal(p, theirs[n]) for n, p in ours.parameters.items())


def test_ratios_of_one_change_nothing_and_others_reach_the_loop(tiny_model_folder):
    """Catches: a default that splits the parameters otherwise, a ratio that the loop does not pass on."""
    plain = make_trainer(tiny_model_folder)
    assert len(plain.optimizer._optimizer.param_groups) == 1
    run(plain)
    ratios = AdapterConfig(b_rate_ratio=4).rate_ratio
    trainer = make_trainer(tiny_model_folder)
    faster = type(trainer)(
        trainer.model, trainer.examples, trainer.config, trainer.context, 0, rate_ratio=ratios
    )
    found = {group["rate_ratio"]: len(group["params"]) for group in faster.optimizer._optimizer.param_groups}
    assert found == {1.0: 28, 4.0: 14}
    run(faster)
    assert not torch.equal(*(parameters(t)[next(iter(parameters(t)))] for t in (plain, faster)))


@pytest.mark.parametrize("name", HERE)
def test_it_trains(tiny_model_folder, name):
    """Catches: an optimizer that the loop cannot use, whose steps are of the wrong sign, or whose norms go
    stale."""
    rate = {"sgd": 0.5, "ranger": 2e-2}.get(name, 2e-3)
    trainer = make_trainer(
        tiny_model_folder, dtype="bfloat16", max_steps=12, optimizer=name, learning_rate=rate, clip_norm=None
    )
    losses = [m.loss for m in run(trainer)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "lion", "optimizer_options": {"eps": 1e-8}}, "lion has no 'eps'; "),
        ({"optimizer_options": {"epps": 1e-8}}, "adamw has no 'epps'; did you mean 'eps'"),
        ({"optimizer_options": {"betas": [0.8, 0.9]}}, r"betas: set training\.beta1 and training\.beta2"),
        ({"optimizer_options": {"lr": 1.0}}, r"lr: set training\.learning_rate instead"),
        ({"optimizer_options": {"fused": False}}, "adamw has no 'fused'"),
        ({"optimizer": "sgd", "optimizer_options": {"momentum": -1.0}}, "Invalid momentum"),
        ({"optimizer": "lion", "beta2": 0.95}, r"mean nothing to 'lion'.*optimizer_options\.betas"),
        ({"optimizer": "paged_adamw8bit"}, "moves its moments between a CUDA GPU and the CPU.*adamw8bit"),
    ],
)
def test_what_is_refused(settings, message):
    """Catches: an option that is passed over, a typo answered with a traceback after the base is loaded."""
    with pytest.raises(InputError, match=message):
        check_optimizer(TrainingConfig(max_steps=1, **settings), CPU, sharded=False)


@pytest.mark.parametrize("name", HERE)
def test_what_is_allowed_on_shards_updates_each_element_alone(name):
    """Catches: an optimizer that is said to train shards and looks at the full tensor."""
    options = {"optimizer": name, "optimizer_options": OPTIONS.get(name, {})}
    config = TrainingConfig(max_steps=9, learning_rate=1e-2, weight_decay=0.1, **options)
    generator = torch.Generator().manual_seed(0)
    start_OI = torch.randn(24, 32, generator=generator)
    rows = {"full": slice(None), "upper": slice(0, 9), "lower": slice(9, None)}
    found = {}
    for part, of_part in rows.items():
        parameter = adapter_parameter(start_OI[of_part].clone())
        optimizer = AdapterOptimizer({"p": parameter}, config)
        for step in range(4):
            generator = torch.Generator().manual_seed(step)
            # Rows of unlike sizes: a norm of some of them is not that of all.
            gradient_OI = torch.randn(24, 32, generator=generator) * torch.arange(1, 25)[:, None]
            parameter.grad = gradient_OI[of_part].clone()
            optimizer.step(1e-2)
        found[part] = parameter.detach()
    moved = (found["full"] - start_OI).abs().max()
    differs = (found["full"] - torch.cat([found["upper"], found["lower"]])).abs().max() / moved
    assert (differs < 1e-5) if OPTIMIZERS[name].not_sharded is None else (differs > 1e-3)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_shards_are_refused_by_name(name):
    """Catches: an update by the norm or the rows of a shard, which is another one than of the full tensor."""
    config = TrainingConfig(max_steps=1, optimizer=name)
    device = torch.device("cuda") if OPTIMIZERS[name].cuda_only else CPU
    check_optimizer(config, device, sharded=False)
    if OPTIMIZERS[name].not_sharded is None:
        check_optimizer(config, device, sharded=True)
        return
    with pytest.raises(
        InputError, match=f"{name!r} cannot train a sharded model: .*allowed under FSDP: adamw, "
    ):
        check_optimizer(config, device, sharded=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"type": "vera", "b_rate_ratio": 2.0}, "adapter.b_rate_ratio 2 is about B of lora and gated_lora"),
        (
            {"dora": False, "magnitude_rate_ratio": 2.0},
            "magnitude_rate_ratio 2.0 given, but adapter.dora is false",
        ),
        ({"magnitude": "frozen", "magnitude_rate_ratio": 2.0}, "adapter.magnitude is 'frozen'"),
        ({"b_rate_ratio": 0.0}, "b_rate_ratio"),
    ],
)
def test_a_rate_of_what_is_not_there_is_refused(settings, message):
    """Catches: a ratio that changes nothing, in silence."""
    with pytest.raises(InputError, match=message):
        AdapterConfig(**settings)
