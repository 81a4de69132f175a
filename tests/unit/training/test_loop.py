"""The loop: what a step computes, how a run goes on, and how it stops."""

from __future__ import annotations

import math
import os
import signal

import pytest
import torch

from qdora.adapters import kernels
from qdora.adapters.inject import adapted_layers
from qdora.data.batches import collate
from qdora.errors import InputError, InterruptedRunError
from qdora.training import loop
from qdora.training.loop import DivergedError, count_steps
from qdora.training.loss import completion_loss

from .checkpoints import read_checkpoint, write_checkpoint
from .trainers import make_trainer, parameters, run


def distance(got, expected) -> float:
    return max(float((got[n] - e).norm() / e.norm()) for n, e in expected.items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("parts", [2, 4, 8])
def test_accumulation_equals_one_batch(tiny_model_folder, parts, dtype):
    """Catches: the mean of micro-batch means, gradients that are not summed, or summed in bfloat16."""
    whole = make_trainer(tiny_model_folder, max_steps=1, dtype=dtype)
    split = make_trainer(tiny_model_folder, max_steps=1, dtype=dtype, gradient_accumulation=parts)
    (a,), (b,) = run(whole), run(split)
    assert b.loss == pytest.approx(a.loss, rel=1e-6)
    assert b.grad_norm == pytest.approx(a.grad_norm, rel=1e-5)
    for name, p in whole.parameters.items():
        assert distance({0: split.parameters[name].grad}, {0: p.grad}) < 1e-5, name


def test_the_reported_loss_is_the_mean_over_label_tokens(tiny_model_folder):
    """Catches: a mean over all tokens, over sequences, or one that is taken after the update."""
    trainer = make_trainer(tiny_model_folder, max_steps=1, gradient_accumulation=2)
    batch = [trainer.examples[i] for i in trainer.plan.batch(0)]
    tensors = collate(batch, 0)
    with torch.no_grad():
        total = float(completion_loss(trainer.model, tensors))
    labels = len(tensors.targets_N)
    (metrics,) = run(trainer)
    assert metrics.loss == pytest.approx(total / labels, rel=1e-6)
    assert metrics.tokens == sum(len(example.input_ids) for example in batch)
    assert metrics.step == 1
    assert metrics.tokens_per_second == pytest.approx(metrics.tokens / metrics.seconds)


@pytest.mark.parametrize("clip", [1e-3, None])
def test_clipping_reports_the_norm_before_it(tiny_model_folder, clip):
    """Catches: a reported norm that is always the limit, or a gradient that is not clipped."""
    trainer = make_trainer(tiny_model_folder, max_steps=1, clip_norm=clip)
    (metrics,) = run(trainer)
    left = math.sqrt(sum(float(p.grad.square().sum()) for p in trainer.parameters.values()))
    assert metrics.grad_norm > 0.01
    assert left == pytest.approx(clip or metrics.grad_norm, rel=1e-3)


def test_the_same_seed_gives_the_same_bits_and_another_does_not(tiny_model_folder):
    """Catches: a random draw that depends on what ran before."""
    first = make_trainer(tiny_model_folder, dropout=0.2, dtype="bfloat16")
    one = run(first)
    torch.randn(17)
    second = make_trainer(tiny_model_folder, dropout=0.2, dtype="bfloat16")
    two = run(second)
    assert [m.loss for m in one] == [m.loss for m in two]
    assert all(torch.equal(v, parameters(second)[n]) for n, v in parameters(first).items())
    other = make_trainer(tiny_model_folder, dropout=0.2, dtype="bfloat16", seed=1)
    assert [m.loss for m in run(other)] != [m.loss for m in one]


@pytest.mark.parametrize("seed", [2**31, 1_800_000_000_000])
def test_large_seeds(tiny_model_folder, seed):
    """Catches: a seed that the configuration allows and torch refuses, with a traceback at step 1."""
    (metrics,) = run(make_trainer(tiny_model_folder, max_steps=1, seed=seed))
    assert math.isfinite(metrics.loss)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resumed_equals_uninterrupted(tiny_model_folder, tmp_path, dtype):
    """Catches: data order, dropout, schedule or moments that start anew on resume."""
    options = {"dtype": dtype, "dropout": 0.1, "max_steps": 7, "warmup_steps": 4, "schedule": "cosine"}
    straight = make_trainer(tiny_model_folder, **options)
    expected = run(straight)
    first = make_trainer(tiny_model_folder, save_every=2, **options)

    def save(step):
        write_checkpoint(tmp_path, step, first.optimizer.state(), {})

    run(first, save=save)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-2", "step-4", "step-6", "step-7"]
    second = make_trainer(tiny_model_folder, **options)
    found = read_checkpoint(tmp_path / "step-4", second.optimizer.state(), {})
    second.optimizer.load_state(found.tensors)
    rest = run(second, start=found.step)
    assert [(m.step, m.loss, m.lr, m.grad_norm) for m in rest] == [
        (m.step, m.loss, m.lr, m.grad_norm) for m in expected[4:]
    ]
    assert all(torch.equal(v, parameters(second)[n]) for n, v in parameters(straight).items())


def test_a_smaller_last_batch_and_several_epochs(tiny_model_folder):
    """Catches: a last batch that is dropped, divided by the full batch, or split into empty micro-batches."""
    trainer = make_trainer(tiny_model_folder, count=9, max_steps=5, gradient_accumulation=4)
    sizes = [len(trainer.plan.batch(step)) for step in range(5)]
    assert sizes == [8, 1, 8, 1, 8]
    metrics = run(trainer)
    assert [m.step for m in metrics] == [1, 2, 3, 4, 5]
    assert all(0.5 < m.loss < 10 for m in metrics)


def test_epochs_become_steps(tiny_model_folder):
    """Catches: a fraction of an epoch rounded to no step, a last batch that is not counted."""
    config = make_trainer(tiny_model_folder).config
    steps = {
        e: count_steps(config.model_copy(update={"max_steps": None, "epochs": e}), 3)
        for e in (0.01, 1.0, 2.5)
    }
    assert steps == {0.01: 1, 1.0: 3, 2.5: 8}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_divergence_names_step_and_batch_and_changes_nothing(tiny_model_folder, value):
    """Catches: a run that trains on with NaN, or moments and parameters spoiled by the failed step."""
    trainer = make_trainer(tiny_model_folder, max_steps=3)
    name = next(n for n in trainer.parameters if n.endswith("b_OR"))

    def poison(metrics):
        with torch.no_grad():
            trainer.parameters[name].fill_(value)
        before.update({key: t.clone() for key, t in trainer.optimizer.state().items()})

    before: dict[str, torch.Tensor] = {}
    saved: list[int] = []
    with pytest.raises(DivergedError, match=r"step 2: loss") as error:
        run(trainer, log=poison, save=saved.append)
    for index in trainer.plan.batch(1):
        assert trainer.examples[index].origin in str(error.value)
    for key, tensor in trainer.optimizer.state().items():
        assert torch.equal(torch.nan_to_num(tensor), torch.nan_to_num(before[key])), key
    assert saved == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e5])
@pytest.mark.parametrize("when", ["last", "save_every", "stop"])
def test_an_update_that_no_loss_has_seen_is_not_saved(tiny_model_folder, monkeypatch, when, value):
    """Catches: a checkpoint or a finished adapter of NaN or 1e30, since the loss came before the update."""
    trainer = make_trainer(tiny_model_folder, max_steps=2 if when == "last" else 5, save_every=2)
    if when == "stop":
        trainer.config = trainer.config.model_copy(update={"save_every": None})
    name = next(n for n in trainer.parameters if n.endswith("layers.1.mlp.up_proj.update.b_OR"))
    update, saved = trainer.optimizer.step, []

    def step(rate, skip):
        update(rate, skip)
        with torch.no_grad():
            trainer.parameters[name][0, 1] = value if trainer.optimizer.state()["step/" + name] == 2 else 0.1

    def log(metrics):
        if when == "stop" and metrics.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(trainer.optimizer, "step", step)
    with pytest.raises(DivergedError, match=rf"step 2: after its update {name} holds a value of"):
        run(trainer, log=log, save=saved.append)
    assert saved == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(tiny_model_folder, number, code):
    """Catches: a run killed in the middle of a step, or whose signal handlers stay behind."""
    trainer = make_trainer(tiny_model_folder)
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    saved: list[int] = []

    def log(metrics):
        if metrics.step == 2:
            os.kill(os.getpid(), number)

    with pytest.raises(InterruptedRunError, match=r"after step 3 of 5.*--resume") as stop:
        run(trainer, log=log, save=saved.append)
    assert stop.value.exit_code == code
    assert saved == [3]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers


def test_a_signal_in_the_last_step_lets_the_run_finish(tiny_model_folder):
    """Catches: a complete run reported as interrupted."""
    trainer = make_trainer(tiny_model_folder, max_steps=2)
    saved: list[int] = []
    log = lambda m: os.kill(os.getpid(), signal.SIGTERM) if m.step == 1 else None  # noqa: E731
    run(trainer, log=log, save=saved.append)
    assert saved == [2]


def test_saving_and_evaluating_happen_when_asked(tiny_model_folder):
    """Catches: a checkpoint off by one, an evaluation that leaves dropout off, a second one at the end."""
    trainer = make_trainer(tiny_model_folder, max_steps=6, save_every=4)
    trainer.evaluate_every = 3
    saved, evaluated, modes = [], [], []

    def evaluate(step):
        evaluated.append(step)
        trainer.model.eval()

    run(trainer, log=lambda m: modes.append(trainer.model.training), save=saved.append, evaluate=evaluate)
    assert (saved, evaluated, modes) == ([4, 6], [3], [True] * 6)
    assert not trainer.model.training


def test_a_batch_that_does_not_divide_is_refused(tiny_model_folder):
    """Catches: a rank without its share of every batch, found out in the middle of a run."""
    trainer = make_trainer(tiny_model_folder, batch_size=6, gradient_accumulation=2)
    trainer.context.world_size = 4
    with pytest.raises(
        InputError, match=r"batch_size 6 does not divide over 4 processes x 2 .* multiples of 8"
    ):
        type(trainer)(trainer.model, trainer.examples, trainer.config, trainer.context, 0)


def test_gradient_checkpointing_changes_nothing(tiny_model_folder):
    """Catches: a recomputed forward with another dropout mask or a stale norm."""
    plain = make_trainer(tiny_model_folder, dropout=0.2, max_steps=3)
    recomputed = make_trainer(tiny_model_folder, dropout=0.2, max_steps=3, gradient_checkpointing=True)
    a, b = run(plain), run(recomputed)
    assert [m.loss for m in b] == pytest.approx([m.loss for m in a], rel=1e-6)
    assert distance(parameters(recomputed), parameters(plain)) < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_norm_follows_the_update(tiny_model_folder, dtype):
    """Catches: DoRA trained with the norm of an earlier step."""
    trainer = make_trainer(tiny_model_folder, dtype=dtype, max_steps=3)
    run(trainer)
    for layer in adapted_layers(trainer.model).values():
        kept = layer.weight_norm().clone()
        layer._norms.forget()
        assert torch.allclose(kept, layer.weight_norm(), rtol=1e-5)


def test_kernels_bring_all_norms_up_to_date_after_a_step(tiny_model_folder, monkeypatch):
    """Catches: a norm that every forward pass computes, or the next one, where there are kernels."""
    monkeypatch.setattr(kernels, "available", lambda device: True)
    calls: list[int] = []
    original = kernels.row_norm
    monkeypatch.setattr(kernels, "row_norm", lambda *args: calls.append(1) or original(*args))
    trainer = make_trainer(tiny_model_folder, max_steps=3, gradient_accumulation=2)
    layers = adapted_layers(trainer.model).values()
    assert len(calls) == len(layers)
    run(trainer)
    assert len(calls) == len(layers) * (1 + 1 + 3)  # the start, the first forward pass, three steps
    assert all(layer._norms.is_fresh(layer.update.factors()) for layer in layers)


def test_an_evaluation_that_a_stop_left_out_is_made_up_for(tiny_model_folder):
    """Catches: a run that is killed or stopped between a checkpoint and the evaluation of that step, and then
    never evaluates it."""
    trainer = make_trainer(tiny_model_folder, max_steps=6)
    trainer.evaluate_every = 2
    for start, expected in ((0, [2, 4]), (2, [2, 4]), (3, [4]), (6, [])):
        evaluated: list[int] = []
        modes: list[bool] = []
        log = lambda m: modes.append(trainer.model.training)  # noqa: E731, B023
        run(trainer, start, log=log, evaluate=lambda step: evaluated.append(step) or trainer.model.eval())  # noqa: B023
        assert evaluated == expected, start
        assert all(modes)


def test_a_ctrl_c_that_comes_twice_still_saves(tiny_model_folder, monkeypatch):
    """Catches: a checkpoint lost because the launcher passes on the Ctrl-C that the terminal has sent too; a
    second Ctrl-C of the user that is not heard."""
    trainer = make_trainer(tiny_model_folder)
    saved: list[int] = []

    def burst(metrics):
        if metrics.step == 2:
            for _ in range(5):
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises((InterruptedRunError, KeyboardInterrupt)) as stop:
        run(trainer, log=burst, save=saved.append)
    assert (stop.type, saved) == (InterruptedRunError, [3])
    monkeypatch.setattr(loop, "REPEATED", 0.0)
    with pytest.raises(KeyboardInterrupt):
        run(trainer, log=burst, save=saved.append)
    assert saved == [3]
