"""The layers of trained models, against dense float64 matrices."""

from __future__ import annotations

import gc

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qdora.analysis import decomposition
from qdora.analysis.decomposition import weight_change
from qdora.analysis.spectra import Spectrum, layer_spectra, product_singular_values
from qdora.analysis.trained import SavedStep, TrainedModel, index_of, saved_steps
from qdora.errors import InputError
from qdora.run import RunDirectory
from tests.axes import METHODS
from tests.unit.adapters.oracle import relative

from .models import base_settings, train_a_little

CASES = {name: (name, {}) for name in METHODS}
CASES |= {
    "fp4 dora": ("qdora", {"quantization": "fp4"}),
    "int8 lora": ("qlora", {"quantization": "int8"}),
    "int8 vera dora": ("qdvora", {"quantization": "int8"}),
    "pissa": ("qdora", {"init": "pissa"}),
    "pissa dense": ("lora", {"init": "pissa"}),
    "olora": ("qlora", {"init": "olora"}),
}


def expected_change(before_OI: torch.Tensor, after_OI: torch.Tensor) -> tuple[float, float]:
    """The paper's formulas, written out once more."""
    m_O, trained_m_O = before_OI.norm(dim=1), after_OI.norm(dim=1)
    turned_OI = after_OI / trained_m_O[:, None] - before_OI / m_O[:, None]
    return float((trained_m_O - m_O).abs().mean()), float(turned_OI.square().sum(1).mean() / 2)


@pytest.mark.parametrize("case", CASES)
def test_every_method_and_format_agrees_with_dense_matrices(tiny_model_folder, tmp_path, case):
    """Catches: the unquantized base for the one that was trained on, the residual of a start that takes
    singular vectors out of W for W itself, a scale, magnitude or vector left out of a merged weight, and a
    second checkpoint's values taken from the first."""
    method, keys = CASES[case]
    model = TrainedModel(base_settings(tiny_model_folder, method, keys.get("quantization")))
    for seed in (1, 2):
        folder = tmp_path / str(seed)
        weights = train_a_little(tiny_model_folder, folder, method, seed=seed, **keys)
        found = {}
        for layer in model.layers(folder):
            before_OI, after_OI = weights[layer.name]
            assert relative(layer.before(), before_OI) < 1e-6
            assert relative(layer.after(), after_OI) < 1e-6
            found[layer.name] = weight_change(layer.before(), layer.after())
            assert found[layer.name] == pytest.approx(expected_change(before_OI, after_OI), rel=2e-4)
        assert found.keys() == weights.keys()
        assert len(found) == 14
    if METHODS[method].update and "init" not in keys:
        assert all(delta_m > 1e-3 and delta_d > 1e-3 for delta_m, delta_d in found.values())


def test_one_layer_is_merged_at_a_time(tiny_model_folder, tmp_path, monkeypatch):
    """Catches: a list of merged layers, which is a second dense model in memory."""
    train_a_little(tiny_model_folder, tmp_path, "qdora")
    model = TrainedModel(base_settings(tiny_model_folder, "qdora"))
    names = [layer.name for layer in model.layers(tmp_path)]
    gc.collect()
    found, before = [], count_matrices()

    def count(before_OI: torch.Tensor, after_OI: torch.Tensor) -> tuple[float, float]:
        found.append(count_matrices() - before if len(found) < 4 else 2)
        return 0.0, 0.0

    monkeypatch.setattr(decomposition, "weight_change", count)
    saved = SavedStep(tmp_path, 1, final=True)
    assert [c.layer for c in decomposition.changes("run", "qdora", model, saved)] == names
    assert found == [2] * 14


def count_matrices() -> int:
    """Matrices in memory that are no parameters, such as a dense weight."""
    tensors = (found for found in gc.get_objects() if isinstance(found, torch.Tensor))
    return sum(not isinstance(t, nn.Parameter) and t.dim() == 2 and min(t.shape) > 16 for t in tensors)


@pytest.mark.parametrize("case", CASES)
def test_spectra_agree_with_dense_matrices(tiny_model_folder, tmp_path, case):
    """Catches: the singular values of a factor for those of the product, of B A without c or without the
    vectors of VeRA, of a DoRA's B A for those of its full-rank change, or of a residual for the base."""
    method, keys = CASES[case]
    weights = train_a_little(tiny_model_folder, tmp_path, method, seed=3, **keys)
    model = TrainedModel(base_settings(tiny_model_folder, method, keys.get("quantization")))
    names = ["model.layers.1.self_attn.k_proj", "model.layers.0.mlp.down_proj"]
    for layer in (layer for layer in model.layers(tmp_path) if layer.name in names):
        before_OI, after_OI = weights[layer.name]
        expected = {"base": before_OI, "change": after_OI - before_OI}
        if METHODS[method].dora and METHODS[method].update and "init" not in keys:
            s_O = layer.layer.magnitude.value().double() / layer.layer.weight_norm().double()
            expected["update"] = after_OI - s_O[:, None] * before_OI
        found = {spectrum.kind: spectrum for spectrum in layer_spectra(layer)}
        assert found.keys() - {"update"} == expected.keys() - {"update"}
        for kind, matrix_OI in expected.items():
            dense = torch.linalg.svdvals(matrix_OI)
            got = torch.tensor(found[kind].values, dtype=torch.float64)
            assert relative(got, dense[: len(got)]) < 2e-5, kind
            assert dense[len(got) :].sum() < 1e-5 * dense[0], kind
        if method in ("lora", "qlora") and "init" not in keys:
            assert len(found["change"].values) == 4


def test_a_base_alone(tiny_model_folder):
    """Catches: the output layer among the decoder's, or a change where nothing was trained."""
    model = TrainedModel(base_settings(tiny_model_folder, "qlora"))
    found = [spectrum for layer in model.layers(None) for spectrum in layer_spectra(layer)]
    assert len(found) == 14
    assert {spectrum.kind for spectrum in found} == {"base"}
    assert {spectrum.index for spectrum in found} == {0, 1}
    assert index_of("lm_head") is None


def spectrum(*values: float) -> Spectrum:
    return Spectrum("layer", None, "layer", "base", values)


def test_ranks_by_hand():
    """Catches: entropy of squared singular values, or in bits; a stable rank of values instead of squares."""
    assert spectrum(3.0, 3.0, 3.0).effective_rank == pytest.approx(3)
    assert spectrum(2.0, 2.0, 0.0).effective_rank == pytest.approx(2)
    p, q = 3 / 4, 1 / 4
    assert spectrum(3.0, 1.0).effective_rank == pytest.approx(p**-p * q**-q)
    assert spectrum(3.0, 1.0).stable_rank == pytest.approx(10 / 9)
    assert (spectrum(0.0, 0.0).effective_rank, spectrum(0.0).stable_rank) == (0.0, 0.0)


def test_a_rank_above_the_sides_of_a_matrix():
    """Catches: QR of factors that are wider than the matrix, as VeRA's are."""
    generator = torch.Generator().manual_seed(0)
    a_KI = torch.randn(12, 7, generator=generator).double()
    b_OK = torch.randn(9, 12, generator=generator).double()
    torch.testing.assert_close(product_singular_values(a_KI, b_OK), torch.linalg.svdvals(b_OK @ a_KI))


def test_an_adapter_of_another_base_is_refused(tiny_model_folder, tmp_path):
    """Catches: a fully trained model compared with a base that it was not made of, or that lacks a layer."""
    train_a_little(tiny_model_folder, tmp_path, "full")
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(key for key in tensors if key.endswith("v_proj.weight"))
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, path)
    model = TrainedModel(base_settings(tiny_model_folder, "full"))
    with pytest.raises(InputError, match=r"v_proj\.weight is missing, expected"):
        list(model.layers(tmp_path))


def test_steps_of_a_run(tmp_path):
    """Catches: the last checkpoint and the final adapter, which are one state, counted twice; an unfinished
    run refused; a run without anything taken for one of no steps."""
    directory = RunDirectory(tmp_path)
    for step in (5, 10, 20):
        (directory.checkpoints / f"step-{step}").mkdir(parents=True)
    assert [(saved.step, saved.final) for saved in saved_steps(directory)] == [
        (5, False),
        (10, False),
        (20, False),
    ]
    directory.adapter.mkdir()
    (directory.adapter / "adapter_model.safetensors").touch()
    assert [(saved.step, saved.final) for saved in saved_steps(directory)] == [
        (5, False),
        (10, False),
        (20, True),
    ]
    empty = RunDirectory(tmp_path / "empty")
    with pytest.raises(InputError, match="the run has no adapter"):
        saved_steps(empty)
