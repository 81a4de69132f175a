"""The loss on its own: gradients, chunks, and the output layers that it can stand in for."""

from __future__ import annotations

import pytest
import torch

from qdora.adapters.inject import inject
from qdora.config import AdapterConfig
from qdora.data.batches import collate
from qdora.data.tokenize import TokenizedExample
from qdora.errors import InputError
from qdora.models.load import load_base
from qdora.training import loss as loss_module
from qdora.training.loss import check_output_layer, completion_loss
from tests.tiny import write_tiny_model
from tests.unit.adapters.oracle import relative

from .trainers import make_model


def make_batch():
    generator = torch.Generator().manual_seed(4)
    lengths = [(15, 6), (9, 2), (12, 11)]
    return collate(
        [
            TokenizedExample(torch.randint(4, 90, (n,), generator=generator).tolist(), p, "")
            for n, p in lengths
        ],
        pad_id=0,
    )


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("rows_in_a_chunk", [1, 4, 20, 1000])
def test_every_adapter_gradient_is_that_of_the_plain_logits(tiny_model_folder, monkeypatch, rows_in_a_chunk):
    """Catches: a gradient of one chunk written over another's, a scale of the incoming gradient dropped."""
    model = make_model(tiny_model_folder)
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 4 * 100 * rows_in_a_chunk)
    batch = make_batch()
    ours = completion_loss(model, batch.input_ids_BT, batch.labels_BT)
    assert ours.dtype == torch.float32
    got = gradients(model, ours / 7)
    count = int((batch.labels_BT[:, 1:] != -100).sum())
    assert count == 9 + 7 + 1
    theirs = model(input_ids=batch.input_ids_BT, labels=batch.labels_BT).loss * count
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-6)
    expected = gradients(model, theirs / 7)
    assert {n.rsplit(".", 1)[-1] for n in expected} == {"a_RI", "b_OR", "offset_O"}
    assert max(relative(got[n], expected[n]) for n in expected) < 1e-4


def test_without_gradients_the_loss_is_the_same(tiny_model_folder):
    """Catches: a loss that only works in training."""
    model, batch = make_model(tiny_model_folder), make_batch()
    trained = completion_loss(model, batch.input_ids_BT, batch.labels_BT)
    with torch.no_grad():
        plain = completion_loss(model, batch.input_ids_BT, batch.labels_BT)
    assert not plain.requires_grad
    assert float(plain) == float(trained.detach())


def test_chunks_bound_the_rows_of_the_output_layer(tiny_model_folder, monkeypatch):
    """Catches: the output layer applied to unlabelled positions, or to all of them at once."""
    model, batch = make_model(tiny_model_folder), make_batch()
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 4 * 100 * 5)
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda m, args, out: rows.append(args[0].shape[0]))
    completion_loss(model, batch.input_ids_BT, batch.labels_BT)
    assert rows == [5, 5, 5, 2]


@pytest.mark.parametrize("setting", ["final_logit_softcapping", "logit_scale", "logits_scaling"])
def test_logits_changed_after_the_output_layer_are_refused(tiny_model_folder, setting):
    """Catches: a training loss of other logits than the model's own."""
    model, _ = load_base(str(tiny_model_folder))
    check_output_layer(model)
    setattr(model.config, setting, 30.0)
    with pytest.raises(InputError, match=setting):
        check_output_layer(model)


def test_an_adapter_on_the_output_layer_is_trained_or_refused(tmp_path):
    """Catches: an adapter on an untied lm_head that never gets a gradient, in silence."""
    folder = write_tiny_model(tmp_path / "m", tie_word_embeddings=False)
    model, _ = load_base(str(folder), base="dense", dtype="float32")
    batch = make_batch()
    try:
        inject(model, AdapterConfig(r=4, method="lora", targets=("q_proj", "lm_head"), dtype="float32"))
        check_output_layer(model)
    except InputError:
        return
    completion_loss(model, batch.input_ids_BT, batch.labels_BT).backward()
    grad = model.lm_head.direction.b_OR.grad
    assert grad is not None
    assert float(grad.abs().sum()) > 0
