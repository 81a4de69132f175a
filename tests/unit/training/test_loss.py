"""The loss on its own: gradients, chunks, and the output layers that it can stand in for."""

from __future__ import annotations

import pytest
import torch

from qdora.adapters.inject import adapted_layers
from qdora.data.batches import collate
from qdora.data.tokenize import TokenizedExample
from qdora.errors import InputError
from qdora.models.load import load_base
from qdora.training import loss as loss_module
from qdora.training.loss import check_output_layer, completion_loss
from tests.axes import adapt
from tests.tiny import write_tiny_model
from tests.unit.adapters.oracle import move_off_the_identity, relative

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


def labels_of(batch):
    """As transformers takes them: aligned with the ids, -100 where there is no loss."""
    labels_BT = torch.full_like(batch.input_ids_BT, -100)
    labels_BT.view(-1)[batch.labelled_N + 1] = batch.targets_N
    return labels_BT


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
    ours = completion_loss(model, batch)
    assert ours.dtype == torch.float32
    got = gradients(model, ours / 7)
    count = len(batch.targets_N)
    assert count == 9 + 7 + 1
    theirs = model(input_ids=batch.input_ids_BT, labels=labels_of(batch)).loss * count
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-6)
    expected = gradients(model, theirs / 7)
    assert {n.rsplit(".", 1)[-1] for n in expected} == {"a_RI", "b_OR", "offset_O"}
    assert max(relative(got[n], expected[n]) for n in expected) < 1e-4


def test_without_gradients_the_loss_is_the_same(tiny_model_folder):
    """Catches: a loss that only works in training."""
    model, batch = make_model(tiny_model_folder), make_batch()
    trained = completion_loss(model, batch)
    with torch.no_grad():
        plain = completion_loss(model, batch)
    assert not plain.requires_grad
    assert float(plain) == float(trained.detach())


def test_chunks_bound_the_rows_of_the_output_layer(tiny_model_folder, monkeypatch):
    """Catches: the output layer applied to unlabelled positions, or to all of them at once."""
    model, batch = make_model(tiny_model_folder), make_batch()
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 4 * 100 * 5)
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda m, args, out: rows.append(args[0].shape[0]))
    completion_loss(model, batch)
    assert rows == [5, 5, 5, 2]


@pytest.mark.parametrize("setting", ["final_logit_softcapping", "logit_scale", "logits_scaling"])
def test_logits_changed_after_the_output_layer_are_refused(tiny_model_folder, setting):
    """Catches: a training loss of other logits than the model's own."""
    model, _ = load_base(str(tiny_model_folder))
    check_output_layer(model)
    setattr(model.config, setting, 30.0)
    with pytest.raises(InputError, match=setting):
        check_output_layer(model)


@pytest.mark.parametrize("rows_in_a_chunk", [4, 1000])
@pytest.mark.parametrize("method", ["lora", "dora", "full"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_trained_output_layer_gets_its_gradient(tmp_path, monkeypatch, method, tied, rows_in_a_chunk):
    """Catches: an adapter on lm_head, or a trained lm_head, that silently stays as it is; one of the two
    gradients of a weight that is tied to the embedding."""
    if tied and method != "full":
        pytest.skip("an adapter on a tied output layer is refused")
    folder = write_tiny_model(tmp_path / "m", tie_word_embeddings=tied)
    model, _ = load_base(str(folder), quantization="none", dtype="float32")
    adapt(model, method, r=4, targets=("q_proj", "lm_head"), dtype="float32")
    for seed, layer in enumerate(adapted_layers(model).values()):
        move_off_the_identity(layer, seed)
    check_output_layer(model)
    batch = make_batch()
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 4 * 100 * rows_in_a_chunk)
    got = gradients(model, completion_loss(model, batch) / 7)
    count = len(batch.targets_N)
    theirs = model(input_ids=batch.input_ids_BT, labels=labels_of(batch)).loss * count
    expected = gradients(model, theirs / 7)
    assert any("lm_head" in name or "embed_tokens" in name for name in expected)
    for name, gradient in expected.items():
        assert relative(got[name], gradient) < 1e-4, name
        assert float(gradient.abs().sum()) > 0, name
