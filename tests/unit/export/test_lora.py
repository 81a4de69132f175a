"""A plain LoRA in place of a DoRA adapter: the best of its rank, read by PEFT, and what it says of itself."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from qdora.adapters.inject import adapted_layers
from qdora.adapters.tokens import train_tokens
from qdora.errors import InputError
from qdora.export import lora
from qdora.export.merged import merged_tensors
from qdora.models.load import load_base
from tests.unit.adapters.oracle import relative

from .jobs import exported, logits, make_job


@pytest.mark.parametrize("shape", [(48, 80), (80, 48)])
def test_the_truncation_is_that_of_a_full_svd(shape):
    """Catches: factors of another matrix, singular values twice or nowhere, a share that is not what is left;
    for a flat spectrum too, where a randomized SVD is worst."""
    change = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    a, b, share = lora.truncate(change, 8)
    sigma = torch.linalg.svdvals(change.double()).square()
    best = float(sigma[:8].sum() / sigma.sum())
    left = change.double() - b.double() @ a.double()
    assert share == pytest.approx(1 - float(left.norm() / change.double().norm()) ** 2, abs=1e-5)
    assert 0.98 * best < share < best + 1e-5
    assert a.shape == (8, shape[1])


def test_a_change_of_zero_and_one_of_lower_rank():
    """Catches: NaN of a layer that did not change; a rank that costs accuracy where it is enough."""
    zero = lora.truncate(torch.zeros(6, 4), 2)
    assert zero[2] == 1.0
    assert not any(t.any() for t in zero[:2])
    change = torch.randn(40, 3) @ torch.randn(3, 30)
    a, b, share = lora.truncate(change, 5)
    assert share == pytest.approx(1)
    assert relative(b @ a, change) < 1e-5


@pytest.mark.parametrize(("method", "onto"), [("qlora", "nf4"), ("lora", "original")])
def test_peft_computes_the_merged_weights(tmp_path, tiny_model_folder, method, onto, capsys):
    """Catches: a LoRA of the wrong difference, or for another base than the one that is said."""
    job = make_job(tmp_path, tiny_model_folder, "lora", method=method, r=4, onto=onto)
    expected = logits(job.model)
    folder = exported(job, "lora")
    base, _ = load_base(str(tiny_model_folder), quantization=job.config.model.quantization, dtype="float32")
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    plain.load_state_dict(dict(merged_tensors(base, torch.float32)), strict=False)
    theirs = peft.PeftModel.from_pretrained(plain, folder)
    assert relative(logits(theirs), expected) < 1e-5
    assert "WARNING" not in capsys.readouterr().err
    where = {"original": "original", "nf4": "quantized"}[onto]
    assert f"read back onto the {where} base: logits differ by" in lora.verify(job, folder)


def test_each_share_is_that_of_the_merged_weight_less_the_servers(tmp_path, tiny_model_folder):
    """Catches: shares of c B A alone, or of the difference from a base that the server does not hold."""
    job = make_job(tmp_path, tiny_model_folder, "lora", r=8, onto="original")
    layers = adapted_layers(job.model)
    report = json.loads((exported(job, "lora") / "kept.json").read_text())
    kept, total = 0.0, 0.0
    for name, layer in layers.items():
        change = layer.merged(torch.float32).double() - job.checkpoint.read(f"{name}.weight").double()
        sigma = torch.linalg.svdvals(change).square()
        assert report["layers"][name] == pytest.approx(float(sigma[:8].sum() / sigma.sum()), rel=0.02)
        kept, total = kept + float(sigma[:8].sum()), total + float(sigma.sum())
    assert report["layers"].keys() == layers.keys()
    assert report["kept"] == pytest.approx(kept / total, rel=0.01)


def test_what_is_pushed_names_no_folder(tmp_path, tiny_model_folder):
    """Catches: the path of a base on this machine in a folder that goes to the hub."""
    names = {None: str(tiny_model_folder), "ada/sums": tiny_model_folder.name}
    for number, (pushed, base) in enumerate(names.items()):
        job = make_job(tmp_path / str(number), tiny_model_folder, "lora", r=4, push_to_hub=pushed)
        settings = json.loads((exported(job, "lora") / "adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == base
    job = make_job(tmp_path / "nf4", tiny_model_folder, "nf4", method="qlora", push_to_hub="ada/sums")
    settings = json.loads((exported(job, "nf4") / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "ada/sums"


def test_a_small_share_is_loud(tmp_path, tiny_model_folder, capsys):
    """Catches: a LoRA that is another model than the one that was trained, and says nothing of it."""
    job = make_job(tmp_path, tiny_model_folder, "lora", r=1, onto="nf4")
    exported(job, "lora")
    said = capsys.readouterr().err
    assert "WARNING: a LoRA of rank 1 that keeps " in said
    assert "serve --format nf4 or merged weights" in said


def test_what_is_no_low_rank_update_is_refused(tmp_path, tiny_model_folder):
    """Catches: trained tokens left out in silence; a rank beyond a layer's side; a LoRA for a base that the
    adapter's start has changed."""
    job = make_job(tmp_path, tiny_model_folder, "lora", r=33)
    with pytest.raises(InputError, match=r"--r 33: larger than the smaller side of .*k_proj \(32x64\)"):
        lora.write(job, tmp_path / "out")
    job.options.r = 4
    train_tokens(job.model, [5], torch.float32)
    with pytest.raises(InputError, match=r"trained rows of tokens .*allowed: --format merged, nf4"):
        lora.write(job, tmp_path / "out")
    started = make_job(tmp_path / "2", tiny_model_folder, "lora", method="lora", r=4, init="pissa")
    with pytest.raises(InputError, match=r"started from its weight.*allowed: --onto original"):
        lora.write(started, tmp_path / "out")
    assert not (tmp_path / "out").exists()
