"""Validation during training: its loss, the best step, when to stop."""

from __future__ import annotations

import pytest
import torch

from qdora.config import DataConfig
from qdora.data.batches import Packing
from qdora.data.rows import Example
from qdora.data.tokenize import tokenize_examples
from qdora.errors import DataError, InputError
from qdora.training.best import ValidationState, copy_best
from qdora.training.loop import DivergedError
from qdora.training.validation import Validator, hold_out, validation_losses
from tests.golden.curves import examples
from tests.tiny import tiny_tokenizer

from .trainers import make_trainer, parameters, run


def tokenized(few):
    return tokenize_examples(few, tiny_tokenizer(), "question_answer", 128, "stop")[0]


def held_out():
    """Two tasks of different sizes, whose examples are of different lengths."""
    return {"sums": tokenized(examples()[20:27]), "more": tokenized(examples()[27:30])}


def validate(trainer, *, every=2, state=None, score=None):
    """A validator of a trainer, and what it logs and keeps."""
    logged, kept = [], []
    trainer.validate_every = every
    validator = Validator(
        trainer,
        held_out(),
        state or ValidationState(),
        log=lambda metrics, is_best: logged.append((metrics, is_best)),
        keep=lambda state: kept.append(state.best_step),
        score=score,
    )
    return validator, logged, kept


@pytest.mark.parametrize("packing", [Packing(), Packing(joined=True)])
def test_the_loss_is_transformers_mean_over_completion_tokens(tiny_model_folder, packing):
    """Catches: a mean of batch means, prompts or padding in the loss, dropout left on, tokens counted for
    another task."""
    trainer = make_trainer(tiny_model_folder, dropout=0.5, batch_size=4, packing=packing)
    trainer.model.train()
    loss, losses = validation_losses(trainer, held_out())
    trainer.model.eval()
    sums, counts = {}, {}
    for task, of_task in held_out().items():
        for example in of_task:
            ids = torch.tensor([example.input_ids])
            labels = ids.clone()
            labels[:, : example.prompt_length] = -100
            count = ids.shape[1] - example.prompt_length
            with torch.no_grad():
                mean = float(trainer.model(input_ids=ids, labels=labels).loss)
            sums[task] = sums.get(task, 0) + mean * count
            counts[task] = counts.get(task, 0) + count
    assert losses == pytest.approx({task: sums[task] / counts[task] for task in sums}, rel=1e-5)
    assert loss == pytest.approx(sum(sums.values()) / sum(counts.values()), rel=1e-5)


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"gradient_checkpointing": True}])
def test_training_is_the_same_with_and_without_it(tiny_model_folder, options):
    """Catches: a random number drawn, dropout left off, a gradient or a norm left behind by a validation."""
    plain = make_trainer(tiny_model_folder, dropout=0.2, **options)
    expected = run(plain)
    trainer = make_trainer(tiny_model_folder, dropout=0.2, **options)
    validator, logged, _ = validate(trainer)
    found = run(trainer, validate=validator)
    assert [(m.loss, m.grad_norm) for m in found] == [(m.loss, m.grad_norm) for m in expected]
    assert all(torch.equal(v, parameters(trainer)[n]) for n, v in parameters(plain).items())
    assert [metrics.step for metrics, _ in logged] == [0, 2, 4, 5]


def test_it_leaves_no_gradient_and_the_mode_of_training(tiny_model_folder):
    """Catches: memory of a backward pass that never comes; dropout off for the rest of the run."""
    trainer = make_trainer(tiny_model_folder)
    modes = []
    validator, _, _ = validate(trainer)
    run(trainer, validate=validator, log=lambda m: modes.append(trainer.model.training))
    assert modes == [True] * 5
    trainer.optimizer.zero_grad()
    validation_losses(trainer, held_out())
    assert all(p.grad is None for p in trainer.parameters.values())


@pytest.mark.parametrize(
    ("measure", "values", "best", "since"),
    [
        ("loss", [3.0, 2.0, 2.0, 2.5], 1, 2),
        ("loss", [1.0, 2.0, 0.5], 2, 0),
        ("exact_match", [0.0, 0.5, 0.5, 0.25], 1, 2),
        ("exact_match", [0.5, 0.0, 0.75], 2, 0),
    ],
)
def test_the_best_is_the_first_of_equally_good_ones(measure, values, best, since):
    """Catches: a high loss or a low score taken for better, a tie that counts as progress."""
    state = ValidationState()
    for step, value in enumerate(values):
        state = state.after(step, value, measure)
    assert (state.step, state.best_step, state.best_value) == (len(values) - 1, best, values[best])
    assert state.since == since
    assert state.best(measure) == {"step": best, "measure": measure, "value": values[best]}


def test_a_best_adapter_that_is_not_there_replaces_a_later_one(tmp_path):
    """Catches: a run that goes back to before any validation and keeps the best adapter of its future."""
    (tmp_path / "best").mkdir()
    copy_best(tmp_path / "of no checkpoint", tmp_path / "best")
    assert not (tmp_path / "best").exists()


def test_patience_stops_after_its_validations_and_saves(tiny_model_folder):
    """Catches: a stop one validation early or late, without a checkpoint, or with a step after it."""
    scores = {0: 0.25, 1: 0.5, 2: 0.5, 3: 0.0, 4: 1.0}
    trainer = make_trainer(tiny_model_folder, patience=2, max_steps=9)
    validator, logged, kept = validate(trainer, every=1, score=scores.__getitem__)
    saved = []
    found = run(trainer, validate=validator, save=saved.append)
    assert (len(found), saved, kept) == (3, [3], [0, 1])
    assert [is_best for _, is_best in logged] == [True, True, False, False]
    assert [metrics.validation_exact_match for metrics, _ in logged] == [0.25, 0.5, 0.5, 0.0]
    # Started anew from that checkpoint it stops again, without a validation; with more patience it goes on.
    again, logged, _ = validate(trainer, every=1, score=scores.__getitem__, state=validator.state)
    assert (run(trainer, start=3, validate=again), logged) == ([], [])
    trainer.config = trainer.config.model_copy(update={"patience": 3})
    scores |= dict.fromkeys(range(5, 10), 0.0)
    longer, logged, _ = validate(trainer, every=1, score=scores.__getitem__, state=validator.state)
    assert [m.step for m in run(trainer, start=3, validate=longer)] == [4, 5, 6, 7]
    assert logged[0][0].step == 4


def test_a_validation_that_a_stop_left_out_is_made_up_for(tiny_model_folder):
    """Catches: a step that is never validated because a run was stopped there, or that counts twice."""
    trainer = make_trainer(tiny_model_folder, max_steps=6)
    for done, expected in ((2, [4, 6]), (0, [2, 4, 6])):
        validator, logged, _ = validate(trainer, state=ValidationState(done, 0, 9.0, 0))
        run(trainer, start=2, validate=validator)
        assert [metrics.step for metrics, _ in logged] == expected


def test_a_loss_that_is_no_number_ends_the_run(tiny_model_folder):
    """Catches: NaN that is no better than anything, and waits for patience."""
    trainer = make_trainer(tiny_model_folder)
    validator, logged, kept = validate(trainer)
    with torch.no_grad():
        next(p for n, p in trainer.parameters.items() if n.endswith("b_OR")).fill_(float("nan"))
    with pytest.raises(DivergedError, match="step 0: the validation loss is nan"):
        validator(0)
    assert (logged, kept) == ([], [])


def test_examples_are_held_out_by_task_and_bad_ones_said():
    """Catches: tasks mixed up, an example that is too long left out in silence, nothing to measure on."""
    source = {"source": "synthetic", "count": 1}
    data = DataConfig(train=source, test={**source, "split": "test"}, max_length=64, bad_rows="skip")
    few = [Example("1?", "one", "1", "a", "a:1"), Example("2?", "two", "2", "b", "b:1")]
    long = Example("3?", "x" * 99, "3", "a", "a:2")
    found, skipped = hold_out(data, tiny_tokenizer(), [*few, long])
    assert {task: [e.origin for e in of] for task, of in found.items()} == {"a": ["a:1"], "b": ["b:1"]}
    assert [row.origin for row in skipped] == ["a:2"]
    with pytest.raises(InputError, match=r"no validation example fits into data\.max_length 64"):
        hold_out(data, tiny_tokenizer(), [long])
    with pytest.raises(DataError, match="a:2"):
        hold_out(data.model_copy(update={"bad_rows": "stop"}), tiny_tokenizer(), [*few, long])
