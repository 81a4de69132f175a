"""Values that are no numbers, settings and tokens that do not fit the model: named, never a score of 0."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qdora.cli import run_command
from qdora.export import job

from .runs import metrics, tiny_tree, write_config

pytestmark = pytest.mark.e2e
B = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
M = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"


def changed(source: Path, target: Path, name: str, value: float) -> Path:
    """A copy of a folder of weights with one value of a tensor replaced."""
    shutil.copytree(source, target)
    [file] = target.glob("*.safetensors")
    tensors = load_file(file)
    tensors[name].view(-1)[3] = value
    save_file(tensors, file, {"format": "pt"})
    return target


def fails(capsys, *words: str) -> str:
    assert run_command(words[0], words[1:]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


@pytest.mark.parametrize(
    ("name", "value", "kind"), [(B, "nan", "NaN"), (M, "nan", "NaN"), (B, "inf", "infinite values")]
)
def test_an_adapter_with_values_that_are_no_numbers(tmp_path, trained, capsys, name, value, kind):
    """Catches: 0.0% with exit code 0 of an adapter that is NaN, or the advice to export it as bf16."""
    adapter = changed(trained / "run" / "adapter", tmp_path / "adapter", name, float(value))
    words = ["--run", str(trained / "run"), "--adapter", str(adapter), "--output", str(tmp_path / "out")]
    for command in (["evaluate"], ["export"], ["export", "--dtype", "bf16"]):
        error = fails(capsys, *command, *words)
        assert f"adapter_model.safetensors: tensor {name} holds {kind}" in error
        assert "bf16" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_base_with_nan_has_no_score(tmp_path, tiny_model_folder, capsys, name):
    """Catches: a report of 0.0% by a base model that computes NaN, or a learning rate blamed for it."""
    model = changed(tiny_model_folder, tmp_path / "model", name, float("nan"))
    config = write_config(tmp_path, tiny_tree(tmp_path, model, max_steps=1))
    said = f"{model}: tensor {name} holds NaN"
    assert said in fails(capsys, "train", "--config", config)
    words = ["--model", str(model), "--data", str(tmp_path / "test.jsonl"), "--output", str(tmp_path / "out")]
    assert said in fails(capsys, "evaluate", *words)
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("dora", "steps"), [(True, 1), (True, 4), (False, 1)])
def test_a_run_that_left_all_bounds_is_not_saved(tmp_path, tiny_model_folder, capsys, dora, steps):
    """Catches: an adapter of 1e30 saved with exit code 0: DoRA's infinite norm hides it from the loss."""
    tree = tiny_tree(tmp_path, tiny_model_folder, max_steps=steps, learning_rate=1e30, clip_norm=None)
    tree["adapter"]["dora"] = dora
    error = fails(capsys, "train", "--config", write_config(tmp_path, tree))
    assert f"step {steps}: after its update " in error
    assert "Lower training.learning_rate" in error
    assert not (tmp_path / "run" / "adapter").exists()
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_an_adapter_whose_norms_overflow(tmp_path, trained, capsys):
    """Catches: a layer that DoRA's infinite norm turns off, scored, exported and called verified."""
    adapter = changed(trained / "run" / "adapter", tmp_path / "adapter", B, 1e30)
    words = ["--run", str(trained / "run"), "--adapter", str(adapter), "--output", str(tmp_path / "out")]
    for command in ("evaluate", "export"):
        error = fails(capsys, command, *words)
        assert "layers.1.self_attn.v_proj are so large that the norm of its weight overflows" in error


GENERATION = [
    {"temperature": 0.9, "top_p": 0.6, "eos_token_id": 2},
    {"do_sample": False, "temperature": 0.01, "top_k": 5, "eos_token_id": [2, 3]},
    {"num_beams": 1, "early_stopping": True, "length_penalty": 0.5},
    {"repetition_penalty": 1.1, "forced_eos_token_id": 400, "eos_token_id": 400, "pad_token_id": -1},
]


@pytest.mark.parametrize("settings", GENERATION)
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_generation_settings_are_exported_as_they_are(tmp_path, trained, tiny_model_folder, file, settings):
    """Catches: `GenerationConfig is invalid` after an export's work, or a client that samples otherwise."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model_folder, model)
    (model / "generation_config.json").unlink()
    path = model / file
    tree = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(tree | settings))
    words = ["--run", str(trained / "run"), "--model", str(model)]
    assert run_command("export", [*words, "--output", str(tmp_path / "out")]) == 0
    base, exported = (AutoModelForCausalLM.from_pretrained(f) for f in (model, tmp_path / "out"))
    exported.save_pretrained(tmp_path / "again")  # a client's own save
    for key, value in settings.items():
        assert getattr(exported.generation_config, key) == getattr(base.generation_config, key) == value


@pytest.mark.parametrize("command", ["train", "evaluate", "export"])
@pytest.mark.parametrize(
    "text", ["{", "[]", '{"max_new_tokens": -1}', '{"early_stopping": 7, "num_beams": 2}']
)
def test_a_generation_config_that_cannot_be_read(
    tmp_path, trained, tiny_model_folder, monkeypatch, capsys, command, text
):
    """Catches: an unusable generation_config.json found out after every weight has been read."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model_folder, model)
    (model / "generation_config.json").write_text(text)
    monkeypatch.setattr("qdora.models.load._WeightLoader.run", None)
    words = ["--run", str(trained / "run"), "--model", str(model), "--output", str(tmp_path / "out")]
    if command == "train":
        words = ["--config", write_config(tmp_path, tiny_tree(tmp_path, model))]
    assert str(model / "generation_config.json") in fails(capsys, command, *words)


def test_a_tokenizer_that_cannot_be_saved_is_found_out_first(tmp_path, trained, monkeypatch, capsys):
    """Catches: an export that fails at its last file, after all has been loaded, merged and written."""

    def save_pretrained(self, folder, **options):
        raise ValueError("this tokenizer has no files")

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", save_pretrained)
    monkeypatch.setattr(job, "load_with_adapter", None)
    words = ["--run", str(trained / "run"), "--output", str(tmp_path / "out")]
    assert "its tokenizer cannot be saved: this tokenizer has no files" in fails(capsys, "export", *words)


@pytest.fixture
def extended(tmp_path, tiny_model_folder) -> Path:
    """The tiny model of 100 rows, whose tokenizer has got a [PAD] of id 100 and <|im_start|> of id 101."""
    shutil.copytree(tiny_model_folder, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.add_tokens(["<|im_start|>"])
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_padding_beyond_the_embedding_is_replaced(tmp_path, trained, extended, capsys):
    """Catches: `index out of range in self`, on a GPU a device assert, for an added [PAD]."""
    config = write_config(tmp_path, tiny_tree(tmp_path, extended, max_steps=1))
    assert run_command("train", ["--config", config]) == 0
    said = "pads with '[PAD]', whose id 100 is beyond the 100 rows of the model's embedding; '<unk>' pads"
    assert capsys.readouterr().err.count(said) == 1
    assert metrics(tmp_path / "run") == metrics(trained / "run")
    assert run_command("evaluate", ["--run", str(tmp_path / "run")]) == 0
    assert said in capsys.readouterr().err
    assert run_command("evaluate", ["--run", str(trained / "run"), "--output", str(tmp_path / "plain")]) == 0
    ours, plain = tmp_path / "run" / "evaluation", tmp_path / "plain"
    name = "sums.predictions.jsonl"
    assert (ours / name).read_text() == (plain / name).read_text().replace(str(trained), str(tmp_path))


@pytest.mark.parametrize(
    ("token", "token_id", "more"),
    [("<|im_start|>", 101, []), ("[PAD]", 100, ["--set", "data.parse_special_tokens=true"])],
)
@pytest.mark.parametrize("part", ["train", "test"])
def test_a_token_beyond_the_embedding_is_named_with_its_row(
    tmp_path, extended, capsys, part, token, token_id, more
):
    """Catches: `index out of range in self` in the middle of an epoch or of the last evaluation."""
    config = write_config(tmp_path, tiny_tree(tmp_path, extended, max_steps=1))
    path = tmp_path / f"{part}.jsonl"
    lines = path.read_text().splitlines()
    lines[4] = json.dumps({"question": f"{token}1+1?", "answer": "1 + 1 = 2. The answer is 2."})
    path.write_text("\n".join(lines))
    wanted = f"{path}:5: token {token!r} has id {token_id}, but the model's embedding has 100 rows"
    assert wanted in fails(capsys, "train", "--config", config, *more)
    assert not (tmp_path / "run").exists()
    assert wanted in fails(capsys, "evaluate", "--model", str(extended), "--data", str(path), *more)


def test_an_eos_token_beyond_the_embedding(tmp_path, extended, capsys):
    """Catches: answers that can never end, since the model has no logit for the tokenizer's EOS."""
    tokenizer = AutoTokenizer.from_pretrained(extended)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    tokenizer.save_pretrained(extended)
    config = write_config(tmp_path, tiny_tree(tmp_path, extended, max_steps=1))
    wanted = "ends texts with '<|im_end|>', whose id 102 is beyond the 100 rows"
    assert wanted in fails(capsys, "train", "--config", config)
    words = ["--model", str(extended), "--data", str(tmp_path / "test.jsonl")]
    assert wanted in fails(capsys, "evaluate", *words)
