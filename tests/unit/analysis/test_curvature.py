"""Gauss-Newton products through the real layers, against dense matrices in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.func import functional_call, jacrev
from transformers import AutoModelForCausalLM

from qdora.adapters.inject import adapted_layers, inject
from qdora.analysis.curvature import curvature, drawn_labels, label_gradients, subspace, trainable_directions
from qdora.data.batches import Batch, collate
from qdora.data.tokenize import TokenizedExample
from qdora.models.load import load_base
from qdora.training.attention import training_attention
from tests.tiny import write_tiny_model

VOCABULARY = 6
LAYERS = ("model.layers.0.self_attn.v_proj", "model.layers.0.mlp.down_proj")
TOKENS = [3, 4, 1, 5, 2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    sizes = {"hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
    path = tmp_path_factory.mktemp("curvature") / "model"
    return write_tiny_model(path, dtype=torch.float32, initializer_range=0.3, **sizes)


@pytest.fixture
def model(folder):
    loaded, _ = load_base(folder, quantization="none", dtype="float32", device="cpu")
    layers = dict(loaded.named_modules())
    shapes = {name: (layers[name].out_features, layers[name].in_features) for name in LAYERS}
    inject(loaded, subspace(LAYERS, shapes, 10), seed=1)  # v_proj has 8 outputs, so a scale of 10 / 8
    return loaded


def sample(labelled: int) -> Batch:
    return collate([TokenizedExample(TOKENS, len(TOKENS) - labelled, "test")], 0)


def dense_gauss_newton(model, folder, name: str, labelled: int) -> tuple[torch.Tensor, torch.Tensor]:
    """H (O R, O R) of the mean loss of the last tokens, and their probabilities (N, V), with plain
    transformers in float64."""
    a_RI = adapted_layers(model)[name].update.a_RI.detach().double()
    q_IR = torch.linalg.qr(a_RI.T).Q
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    w_OI = plain.get_submodule(name).weight.detach()

    def logits(z_OR: torch.Tensor) -> torch.Tensor:
        weights = {f"{name}.weight": w_OI + z_OR @ q_IR.T}
        out = functional_call(plain, weights, (torch.tensor([TOKENS]),), {"use_cache": False})
        return out.logits[0, -labelled - 1 : -1]

    z_OR = torch.zeros(w_OI.shape[0], a_RI.shape[0], dtype=torch.float64)
    j_NVP = jacrev(logits)(z_OR).flatten(2)
    p_NV = logits(z_OR).detach().softmax(-1)
    h_NVV = torch.diag_embed(p_NV) - p_NV[:, :, None] * p_NV[:, None, :]
    return torch.einsum("nvp,nvw,nwq->pq", j_NVP, h_NVV, j_NVP).detach() / labelled, p_NV


@pytest.mark.parametrize("name", LAYERS)
def test_products_with_all_labels_are_those_of_the_dense_matrix(model, folder, name):
    """Catches: the gradient in B for that in the orthonormal subspace, a sum over tokens for a mean, a true
    label for a drawn one, prompt tokens among the completion's, the scale c left in."""
    labelled = 2
    h_PP, p_NV = dense_gauss_newton(model, folder, name, labelled)
    directions = trainable_directions(model)
    found_PP = torch.zeros_like(h_PP)
    with training_attention(model):
        for labels in itertools.product(range(VOCABULARY), repeat=labelled):
            g_OR = label_gradients(model, directions, sample(labelled), torch.tensor(labels))[name]
            weight = p_NV[range(labelled), labels].prod()
            found_PP += weight * torch.outer(g_OR.flatten(), g_OR.flatten()) / labelled
    # Q is unique up to the signs of its rows, which QR decides alike in both.
    v_P = torch.randn(len(h_PP), generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(found_PP @ v_P, h_PP @ v_P, rtol=1e-4, atol=1e-6 * float(h_PP.norm()))
    assert torch.linalg.matrix_norm(found_PP - h_PP) < 1e-5 * torch.linalg.matrix_norm(h_PP)


def test_drawn_labels_come_to_the_dense_matrix(model, folder):
    """Catches: eigenvalues of another matrix than the partial trace over outputs, labels that are not drawn
    from the model's own probabilities, a mean over the wrong number of labels, an error bar that is none."""
    batch = sample(3)
    found = curvature(model, [batch, batch], probes=150, seed=0)
    assert found.keys() == set(LAYERS)
    for name in LAYERS:
        h_PP, _ = dense_gauss_newton(model, folder, name, 3)
        outputs = model.get_submodule(name).out_features
        m_RR = h_PP.unflatten(1, (outputs, -1)).unflatten(0, (outputs, -1)).diagonal(dim1=0, dim2=2).sum(-1)
        expected = torch.linalg.eigvalsh(m_RR).flip(0)
        got = torch.tensor(found[name].eigenvalues, dtype=torch.float64)
        assert found[name].trace == pytest.approx(float(got.sum()))
        assert 0 < found[name].trace_error < 0.2 * found[name].trace
        assert abs(found[name].trace - float(expected.sum())) < 3 * found[name].trace_error
        assert (got - expected).abs().max() < 0.15 * expected[0]
    assert not any(parameter.requires_grad for parameter in model.parameters())
    again = curvature(model, [batch], probes=2, seed=5)
    assert again == curvature(model, [batch], probes=2, seed=5) != curvature(model, [batch], probes=2, seed=6)
    assert curvature(model, [batch], probes=1, seed=5)[LAYERS[0]].trace_error is None


def test_labels_are_drawn_from_what_the_model_predicts(model, folder):
    """Catches: the token at a position for the one after it; uniform or most likely labels."""
    _, p_NV = dense_gauss_newton(model, folder, LAYERS[0], 2)
    with training_attention(model):
        drawn_PN = drawn_labels(model, sample(2), 4000, torch.Generator().manual_seed(0))
    counted_NV = torch.nn.functional.one_hot(drawn_PN, VOCABULARY).double().mean(0)
    assert (counted_NV - p_NV).abs().max() < 4 * 0.5 / 4000**0.5


def test_a_subspace_of_a_small_layer():
    """Catches: a rank above a layer's smaller side, which injection refuses."""
    config = subspace(["q_proj"], {"a.q_proj": (4, 9), "b.q_proj": (20, 30)}, 8)
    assert config.r == 8
    assert config.rank_pattern == {"a.q_proj": 4}
    assert not config.dora
