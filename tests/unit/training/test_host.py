"""What the host does beside the device: where it waits for it, and what it prepares meanwhile."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from qdora.adapters import kernels
from qdora.data.batches import NO_PACKING, Packing
from qdora.training.loop import DivergedError

from .trainers import make_trainer, run

WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "repeat_interleave"}
"""Operators whose result is a number, or has a shape, that only the device knows."""
READING = {"tolist", "item", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__"}
"""Methods that bring a number to the host; on a CPU some of them are no operator."""


class Operators(TorchDispatchMode):
    """Notes the operators that would wait for a GPU, backward's too."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = args[1] if name in ("index", "index_put", "index_put_") else ()
        if name in WAITING or any(m is not None and m.dtype == torch.bool for m in masks):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


class Methods(TorchFunctionMode):
    """Notes the methods that read a tensor."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in READING:
            self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


def waits(do) -> list[str]:
    seen: list[str] = []
    with ExitStack() as stack:
        stack.enter_context(Operators(seen))
        stack.enter_context(Methods(seen))
        do(seen)
    return seen


@pytest.mark.parametrize("packing", [NO_PACKING, Packing(joined=True), Packing(joined=True, row_tokens=128)])
@pytest.mark.parametrize("has_kernels", [False, True])
@pytest.mark.parametrize("recomputed", [False, True])
def test_a_step_waits_for_the_device_once(tiny_model_folder, monkeypatch, packing, has_kernels, recomputed):
    """Catches: labelled positions looked for on the device, a mask or positions that transformers looks at, a
    loss or a norm read in every micro-batch, an update that waits to hear whether the loss is finite."""
    monkeypatch.setattr(kernels, "available", lambda device: has_kernels)
    trainer = make_trainer(
        tiny_model_folder,
        dtype="bfloat16",
        max_steps=2,
        batch_size=4,
        gradient_accumulation=2,
        gradient_checkpointing=recomputed,
        packing=packing,
    )
    assert len(trainer.prepare(1).micro_batches) == 2
    (first, *_) = run(trainer)  # the moments are made, the norms of the weights are known
    batch, update = trainer.prepare(1), trainer.optimizer.step
    request = type("Request", (), {"number": None})()

    def step(seen):
        def updated(rate, skip):
            update(rate, skip)
            seen.append("update")

        monkeypatch.setattr(trainer.optimizer, "step", updated)
        trainer._step(1, batch, request)

    assert waits(step) == ["update", "tolist"]
    assert first.loss > 0


@pytest.mark.gpu
@pytest.mark.parametrize("packing", [NO_PACKING, Packing(joined=True)])
def test_torch_sees_no_wait_before_the_update(tiny_model_folder, monkeypatch, packing):
    """Catches: a wait of a GPU that no operator shows: a copy from memory that is not pinned, a launcher that
    reads a tensor, an optimizer that reads its state."""
    options = {"dtype": "bfloat16", "batch_size": 4, "gradient_accumulation": 2, "packing": packing}
    trainer = make_trainer(tiny_model_folder, on_gpu=True, **options)
    run(trainer)  # kernels are compiled, moments made
    batch, update, micro_batches = trainer.prepare(1), trainer.optimizer.step, trainer._micro_batches

    def watched(of):
        torch.cuda.set_sync_debug_mode("error")
        yield from micro_batches(of)

    def updated(rate, skip):
        update(rate, skip)
        torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(trainer, "_micro_batches", watched)
    monkeypatch.setattr(trainer.optimizer, "step", updated)
    try:
        trainer._step(1, batch, type("Request", (), {"number": None})())
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_what_waits_is_seen():
    """Catches: a count that misses what it counts."""
    x, mask = torch.ones(3, requires_grad=True), torch.tensor([True, False, True])

    def do(seen):
        x[mask].sum().backward()
        x.detach()[mask] = 0.0
        float(x.sum())
        torch.nonzero(mask)
        bool(mask.all())
        torch.equal(x, x)

    seen = waits(do)
    assert seen.count("index") >= 1
    assert {"index_put_", "_local_scalar_dense", "__float__", "nonzero", "__bool__", "equal"} <= set(seen)


def test_the_next_batch_is_made_while_a_step_computes(tiny_model_folder, monkeypatch):
    """Catches: a device that waits for the host to make tensors, a batch made twice or beyond the last step,
    a thread that stays."""
    trainer = make_trainer(tiny_model_folder, max_steps=5)
    prepare, step, made = trainer.prepare, trainer._step, []
    begun, ready = ({number: threading.Event() for number in range(6)} for _ in range(2))

    def noted(number):
        assert number == 2 or begun[number - 1].wait(20), "made before the step that it is to be made beside"
        made.append((number, threading.current_thread() is threading.main_thread()))
        batch = prepare(number)
        ready[number].set()
        return batch

    def waiting(number, batch, stop):
        begun[number].set()
        assert number == 4 or ready[number + 1].wait(20), "not made beside this step"
        return step(number, batch, stop)

    monkeypatch.setattr(trainer, "prepare", noted)
    monkeypatch.setattr(trainer, "_step", waiting)
    assert [m.step for m in run(trainer, start=2)] == [3, 4, 5]
    assert made == [(2, False), (3, False), (4, False)]
    assert not [t for t in threading.enumerate() if t.name.startswith("batches")]
    made.clear()
    assert run(trainer, start=5) == []
    assert made == []


def test_a_batch_that_cannot_be_made_ends_the_run_with_its_error(tiny_model_folder, monkeypatch):
    """Catches: an error that stays in the thread, and a run that waits for ever."""
    trainer = make_trainer(tiny_model_folder)
    prepare, steps = trainer.prepare, []

    def failing(number):
        if number == 2:
            raise OSError("the disk is gone")
        return prepare(number)

    monkeypatch.setattr(trainer, "prepare", failing)
    with pytest.raises(OSError, match="the disk is gone"):
        run(trainer, log=lambda m: steps.append(m.step))
    assert steps == [1, 2]
    assert not [t for t in threading.enumerate() if t.name.startswith("batches")]


def test_the_thread_ends_with_a_run_that_diverges(tiny_model_folder):
    """Catches: a thread that outlives an error of a step."""
    trainer = make_trainer(tiny_model_folder, learning_rate=1e30)
    with pytest.raises(DivergedError):
        run(trainer)
    assert not [t for t in threading.enumerate() if t.name.startswith("batches")]
