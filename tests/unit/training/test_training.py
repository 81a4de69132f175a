"""The loss, the optimizer, the schedule and the loop."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from torch import nn

from qdora.adapters.inject import inject
from qdora.config import AdapterConfig, TrainingConfig
from qdora.data.batches import Batch
from qdora.data.tokenize import tokenize_examples
from qdora.errors import CheckpointError, InputError, InterruptedRunError
from qdora.models.load import load_base
from qdora.training import loss as loss_module
from qdora.training.checkpoint import list_checkpoints, newest_usable
from qdora.training.loop import Callbacks, DivergedError, Trainer
from qdora.training.loss import completion_loss
from qdora.training.optimizer import AdapterOptimizer
from qdora.training.schedule import learning_rate
from tests.golden.curves import examples
from tests.tiny import cpu_context, tiny_tokenizer

from .checkpoints import alone, read_checkpoint, write_checkpoint


def make_trainer(folder, *, dtype="float32", dropout=0.0, **training) -> Trainer:
    model, _ = load_base(str(folder), dtype="float32")
    inject(model, AdapterConfig(r=4, alpha=16, dropout=dropout, dtype=dtype), seed=0)
    data, _ = tokenize_examples(examples()[:20], tiny_tokenizer(), "question_answer", 128, "stop")
    settings = {"max_steps": 6, "batch_size": 8, "learning_rate": 5e-3} | training
    return Trainer(model, data, TrainingConfig(**settings), cpu_context(), pad_id=0)


def run(trainer: Trainer, start: int = 0, save=lambda step: None) -> list:
    metrics = []
    trainer.run(start, Callbacks(log=metrics.append, save=save))
    return metrics


def parameters(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.parameters.items()}


def batch_of(ids_BT, labels_BT) -> Batch:
    """A batch with the labels of transformers: aligned with the ids, -100 where there is no loss."""
    rows, places = (labels_BT[:, 1:] != -100).nonzero(as_tuple=True)
    return Batch(ids_BT, rows * ids_BT.shape[1] + places, labels_BT[rows, places + 1])


@pytest.mark.parametrize("chunk_bytes", [1 << 28, 4 * 99 * 5])
def test_loss_is_that_of_transformers(tiny_model_folder, monkeypatch, chunk_bytes):
    """Catches: labels shifted twice or not at all, padding or prompts in the loss, a wrong last chunk."""
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", chunk_bytes)
    model, _ = load_base(str(tiny_model_folder), dtype="float32")
    inject(model, AdapterConfig(r=4))
    ids = torch.randint(4, 90, (3, 14), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :5] = -100
    ids[1, 9:], labels[1, 9:] = 0, -100
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    b = [p for n, p in model.named_parameters() if n.endswith("b_OR")]
    ours = completion_loss(model, batch_of(ids, labels))
    ours.backward()
    grads = [p.grad.clone() for p in b]
    model.zero_grad()
    count = int((labels[:, 1:] != -100).sum())
    theirs = model(input_ids=ids, labels=labels, attention_mask=mask).loss * count
    theirs.backward()
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)
    for grad, p in zip(grads, b, strict=True):
        assert torch.allclose(grad, p.grad, rtol=1e-3, atol=1e-5)


def test_logits_only_where_there_are_labels(tiny_model_folder):
    """Catches: the output layer applied to prompts and padding."""
    model, _ = load_base(str(tiny_model_folder), dtype="float32")
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda m, args, out: rows.append(args[0].shape[0]))
    ids = torch.randint(4, 90, (2, 10))
    labels = torch.full_like(ids, -100)
    labels[0, 7:] = ids[0, 7:]
    completion_loss(model, batch_of(ids, labels))
    assert rows == [3]


def test_a_model_that_changes_its_logits_is_refused(tiny_model_folder):
    """Catches: soft-capped logits left out of the loss in silence."""
    trainer = make_trainer(tiny_model_folder)
    trainer.model.config.final_logit_softcapping = 30.0
    with pytest.raises(InputError, match="final_logit_softcapping"):
        loss_module.check_output_layer(trainer.model)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("linear", [1 / 3, 2 / 3, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [1 / 3, 2 / 3, 1.0, 0.853553, 0.5, 0.146447]),
        ("constant", [1 / 3, 2 / 3, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_schedule(schedule, rates):
    """Catches: a warm-up that starts at 0 or overshoots, a decay that ends a step early."""
    config = TrainingConfig(max_steps=6, learning_rate=1.0, warmup_steps=2, schedule=schedule)
    assert [learning_rate(config, step, 6) for step in range(6)] == pytest.approx(rates, abs=1e-6)


def test_bf16_parameters_follow_the_float32_trajectory_rounded():
    """Catches: updates smaller than bf16's spacing lost one by one."""
    start = torch.linspace(0.26, 0.95, 16).bfloat16()
    half, full = nn.Parameter(start.clone()), nn.Parameter(start.float())
    half.grad_dtype = torch.float32
    config = TrainingConfig(max_steps=1, learning_rate=1e-5)
    optimizer = AdapterOptimizer({"p": half}, config)
    reference = torch.optim.AdamW([full], lr=1e-5, weight_decay=0.0)
    for step in range(400):
        g = torch.ones(16) * (1 + step % 3)
        half.grad, full.grad = g.clone(), g.clone()
        optimizer.step(1e-5)
        reference.step()
    assert torch.equal(half.detach(), full.detach().bfloat16())
    assert (half != start).all()  # the sum, 4e-3, is more than half a spacing of each; a single step is not
    with pytest.raises(ValueError, match="master/p is missing"):
        optimizer.load_state({k: v for k, v in optimizer.state().items() if k != "master/p"})


def test_accumulation_equals_one_batch(tiny_model_folder):
    """Catches: the mean of micro-batch means, or gradients that are not summed."""
    whole = make_trainer(tiny_model_folder)
    parts = make_trainer(tiny_model_folder, gradient_accumulation=4)
    a, b = run(whole), run(parts)
    assert [m.loss for m in b] == pytest.approx([m.loss for m in a], rel=1e-5)
    assert [m.grad_norm for m in b] == pytest.approx([m.grad_norm for m in a], rel=1e-4)


def test_repeatable_and_resumable_bit_for_bit(tiny_model_folder, tmp_path):
    """Catches: a draw that does not follow from seed and step; moments or masters lost on the way."""
    straight = make_trainer(tiny_model_folder, dtype="bfloat16", dropout=0.2)
    all_metrics = run(straight)
    first = make_trainer(tiny_model_folder, dtype="bfloat16", dropout=0.2)

    def save(step):
        write_checkpoint(tmp_path, step, first.optimizer.state(), {"a": 1})

    first.config = first.config.model_copy(update={"save_every": 4})
    run(first, save=save)
    second = make_trainer(tiny_model_folder, dtype="bfloat16", dropout=0.2)
    found = read_checkpoint(tmp_path / "step-4", second.optimizer.state(), {"a": 1})
    second.optimizer.load_state(found.tensors)
    rest = run(second, start=found.step)
    assert [m.loss for m in rest] == [m.loss for m in all_metrics[4:]]
    for trainer in (first, second):
        for name, value in parameters(straight).items():
            assert torch.equal(value, trainer.parameters[name].detach()), name


def test_a_non_finite_loss_stops_with_step_and_batch(tiny_model_folder):
    """Catches: a run that trains on with NaN, or an update made from it."""
    trainer = make_trainer(tiny_model_folder)
    name = next(n for n in trainer.parameters if n.endswith("b_OR"))
    with torch.no_grad():
        trainer.parameters[name].fill_(float("nan"))
    before = parameters(trainer)
    with pytest.raises(DivergedError, match=r"step 1: loss nan.*batch: .*\+"):
        run(trainer)
    assert all(torch.equal(v, before[n]) for n, v in parameters(trainer).items() if n != name)


def test_sigterm_saves_and_stops(tiny_model_folder):
    """Catches: a stop in the middle of a step, or without a checkpoint."""
    trainer = make_trainer(tiny_model_folder)
    saved: list[int] = []
    log = lambda m: os.kill(os.getpid(), signal.SIGTERM) if m.step == 1 else None  # noqa: E731
    with pytest.raises(InterruptedRunError) as stop:
        trainer.run(0, Callbacks(log=log, save=saved.append))
    assert saved == [2]
    assert stop.value.exit_code == 143


def test_checkpoints_are_whole_verified_and_few(tmp_path):
    """Catches: a half-written folder, a corrupt byte that is loaded, old checkpoints that pile up."""
    tensors = {"master/x": torch.arange(8.0)}

    def save(step, adapter=lambda p: p.mkdir()):
        write_checkpoint(tmp_path, step, tensors, {"rate": 1}, keep=2, save_adapter=adapter)

    for step in (1, 2, 3):
        save(step)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-3", "step-2"]
    with pytest.raises(RuntimeError, match="adapter"):
        save(4, adapter=lambda p: (_ for _ in ()).throw(RuntimeError("adapter")))
    assert {p.name for p in tmp_path.iterdir()} == {"step-3", "step-2"}
    state = tmp_path / "step-3" / "state-0.safetensors"
    data = bytearray(state.read_bytes())
    data[-1] ^= 1
    state.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=r"state-0\.safetensors: corrupt"):
        read_checkpoint(tmp_path / "step-3", tensors, {"rate": 1})
    warnings: list[str] = []
    found = newest_usable(tmp_path, tensors, {"rate": 1}, alone(), warnings.append)
    assert found is not None
    assert found.step == 2
    assert "step-3" in warnings[0]
    with pytest.raises(InputError, match="written with rate = 1, this run has 2"):
        read_checkpoint(tmp_path / "step-2", tensors, {"rate": 2})
