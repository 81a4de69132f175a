"""The whole way: train, evaluate, export, reload, on a tiny random LLaMA and on the real 135M one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qdora.cli import run_command
from qdora.config_file import load_config, set_key
from tests.axes import METHODS, axes_keys
from tests.harness_tasks import CHOICES, write_choices

from .runs import finish, start, tiny_tree, write_config

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, tiny_model_folder) -> Path:
    folder = tmp_path_factory.mktemp("lifecycle")
    tree = tiny_tree(folder, tiny_model_folder, save_every=5)
    tree["evaluation"]["every"] = 5
    tree["training"]["trackers"] = ["tensorboard"]
    output = finish(start("launch/train.py", "--config", write_config(folder, tree), launcher=True))
    assert "14 layers with a low-rank update, 14 with a magnitude" in output
    assert "step 5:" in output
    return folder / "run"


def test_run_directory_holds_what_it_promises(run_folder):
    """Catches: a file of the contract that is missing or says nothing."""
    names = {path.name for path in run_folder.iterdir()}
    assert {"config.yaml", "manifest.json", "metrics.jsonl", "loss.png", "adapter", "checkpoints"} <= names
    assert load_config(run_folder / "config.yaml").training.max_steps == 10
    manifest = json.loads((run_folder / "manifest.json").read_text())
    assert manifest["data"]["train"] == 96
    assert manifest["base"]["fingerprint"]
    assert manifest["versions"]["torch"] == torch.__version__
    assert "launch/train.py" in manifest["command"]
    steps = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert [s["step"] for s in steps] == list(range(1, 11))
    keys = {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "peak_memory_bytes", "seconds"}
    assert all(s.keys() == keys for s in steps)
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert json.loads((run_folder / "evaluation" / "step-5" / "sums.json").read_text())["total"] == 8
    assert {p.name for p in (run_folder / "checkpoints").iterdir()} == {"step-5", "step-10"}
    assert list(run_folder.glob("qdora/events*")), "the tracker wrote nothing"
    assert "None were measured." in (run_folder / "adapter" / "README.md").read_text()


def test_evaluate_with_and_without_the_adapter(run_folder, capsys):
    """Catches: reports of the base written over those of the run, or predictions left out."""
    assert run_command("evaluate", ["--run", str(run_folder)]) == 0
    assert "sums" in capsys.readouterr().out
    assert run_command("evaluate", ["--run", str(run_folder), "--base-only", "--limit", "3"]) == 0
    report = json.loads((run_folder / "evaluation" / "sums.json").read_text())
    assert report["total"] == 8
    assert report["per_scorer"].keys() == {"normalized", "published", "math_verify"}
    lines = (run_folder / "evaluation" / "sums.predictions.jsonl").read_text().splitlines()
    assert len(lines) == 8
    assert {"prompt", "output", "extracted", "gold"} <= json.loads(lines[0]).keys()
    assert json.loads((run_folder / "evaluation-base" / "sums.json").read_text())["total"] == 3
    (result,) = ModelCard.load(run_folder / "adapter" / "README.md").data.eval_results
    assert (result.dataset_name, result.metric_value) == ("sums", report["score"])


def test_a_run_is_scored_by_the_harness(run_folder, tmp_path, capsys, monkeypatch):
    """Catches: options that do not come to the harness; its scores lost to the reports or the card."""
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install lm-eval")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    tasks = write_choices(tmp_path / "tasks", CHOICES)
    words = ["--run", str(run_folder), "--lm-eval", "choices", "--lm-eval-tasks", str(tasks), "--limit", "3"]
    assert run_command("evaluate", words) == 0
    shown = capsys.readouterr().out
    assert "acc_norm" in shown
    report = json.loads((run_folder / "evaluation" / "lm-eval" / "choices.json").read_text())
    assert (report["total"], report["decoding"]["weights"]) == (3, "merged")
    assert f"{report['metrics'][0]['value']:.4f}" in shown
    assert "| choices | acc (lm_eval " in (run_folder / "adapter" / "README.md").read_text()


def test_evaluate_with_shots(run_folder, tmp_path, capsys):
    """Catches: shots that a command does not draw, with the adapter or without."""
    words = ["--run", str(run_folder), "--output", str(tmp_path), "--set", "evaluation.shots=2"]
    for more in ([], ["--base-only"]):
        assert run_command("evaluate", [*words, "--limit", "3", *more]) == 0
        shots = json.loads((tmp_path / "sums.json").read_text())["decoding"]["shots"]
        assert len(shots) == 2
        assert all(origin.startswith(str(run_folder.parent / "train.jsonl")) for origin in shots)
        line = json.loads((tmp_path / "sums.predictions.jsonl").read_text().splitlines()[0])
        assert line["prompt"].count("###Question:") == 3
    assert run_command("evaluate", [*words, "--set", "evaluation.shots=97"]) == 2
    assert "evaluation.shots 97: the training set" in capsys.readouterr().err


def test_options_are_ranked_without_a_run(tiny_model_folder, tmp_path, capsys):
    """Catches: ranking that needs a run; a table that calls its accuracy an exact match."""
    rows = [{"question": f"Is {i} odd?", "answer": "yes" if i % 2 else "no"} for i in range(4)]
    path = tmp_path / "odd.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--model", str(tiny_model_folder), "--data", str(path), "--output", str(tmp_path)]
    words += ["--set", "evaluation.method=rank", "--set", "data.prompt=cloze"]
    assert run_command("evaluate", words) == 2
    assert "answers of 'file' are numeric" in capsys.readouterr().err
    words += ["--set", "data.test.answer_kind=choice", "--set", "data.test.columns.answer=answer"]
    assert run_command("evaluate", words) == 0
    assert "accuracy" in capsys.readouterr().out
    report = json.loads((tmp_path / "odd.json").read_text())
    assert (report["metric"], report["scorer"], report["total"]) == ("accuracy", "likelihood", 4)


def test_evaluate_without_a_run(run_folder, tiny_model_folder, tmp_path, capsys):
    """Catches: a command that only works on its own run directories."""
    words = ["--model", str(tiny_model_folder), "--adapter", str(run_folder / "adapter")]
    words += ["--data", str(run_folder.parent / "test.jsonl"), "--output", str(tmp_path)]
    words += ["--set", "evaluation.max_new_tokens=8", "--set", "data.max_length=128"]
    assert run_command("evaluate", words) == 0
    assert json.loads((tmp_path / "test.json").read_text())["total"] == 8
    dense = ["--model", str(tiny_model_folder), "--data", str(run_folder.parent / "test.jsonl")]
    dense += ["--set", "model.quantization=none", "--set", "evaluation.max_new_tokens=8", "--limit", "2"]
    assert run_command("evaluate", [*dense, "--set", "data.max_length=128"]) == 0


def test_other_data_leave_a_runs_own_reports_alone(run_folder, tmp_path, capsys):
    """Catches: scores on a file written over those on the run's test set; its column mapping forgotten."""
    other = tmp_path / "sums.jsonl"
    rows = (run_folder.parent / "test.jsonl").read_text().splitlines()[:2]
    other.write_text("\n".join(rows) + "\n")
    before = {p: p.read_bytes() for p in (run_folder / "evaluation").rglob("*") if p.is_file()}
    assert run_command("evaluate", ["--run", str(run_folder), "--data", str(other)]) == 0
    assert "/2" in capsys.readouterr().out
    assert before == {p: p.read_bytes() for p in (run_folder / "evaluation").rglob("*") if p.is_file()}


@pytest.mark.parametrize(("dtype", "onto"), [("fp16", "nf4"), ("bf16", "nf4"), ("fp16", "original")])
def test_export_reloads_in_plain_transformers(run_folder, tmp_path, capsys, dtype, onto):
    """Catches: an export that only our own code can read, or that says something else."""
    words = ["--run", str(run_folder), "--output", str(tmp_path / "out"), "--dtype", dtype, "--onto", onto]
    assert run_command("export", words) == 0
    assert "verified: plain transformers loads it" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    assert ModelCard.load(tmp_path / "out" / "README.md").data.library_name == "transformers"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer("a7: 7+7?")["input_ids"]) == "a7: 7+7?"
    assert run_command("export", words) == 2
    assert "already exists" in capsys.readouterr().err


AXES = {
    "full": ("full", {}),
    "full then nf4": ("full", {"evaluation.quantization": "nf4"}),
    "nf4 vera dora": ("qdvora", {}),
    "vera": ("vera", {}),
    "nf4 magnitude": ("qmagnitude", {}),
    "fp4": ("qdora", {"model.quantization": "fp4"}),
    "int8": ("qdora", {"model.quantization": "int8"}),
    "nf2": ("qdora", {"model.quantization": "nf2"}),
    "int8 lora": ("qlora", {"model.quantization": "int8", "model.double_quantization": False}),
    "gaussian": ("qdora", {"adapter.init": "gaussian"}),
    "orthogonal": ("dora", {"adapter.init": "orthogonal"}),
    "gated, frozen magnitude": ("qgdora", {"adapter.magnitude": "frozen"}),
    "published recipe": (
        "qdora",
        {
            "adapter.init": "gaussian_sqrt",
            "adapter.magnitude_start": "original",
            "training.master_weights": False,
        },
    ),
    "pissa": ("qdora", {"adapter.init": "pissa"}),
    "pissa dense": ("lora", {"adapter.init": "pissa"}),
}


@pytest.mark.parametrize("name", AXES)
def test_every_choice_on_the_axes_goes_the_whole_way(tiny_model_folder, tmp_path, capsys, name):
    """Catches: a choice that trains and then cannot be saved, resumed, scored or exported."""
    method, keys = AXES[name]
    tree = tiny_tree(tmp_path, tiny_model_folder, max_steps=4, save_every=2)
    if METHODS[method].full:
        del tree["adapter"]
        tree["training"]["mode"] = "full"
    else:
        tree["adapter"] = {**axes_keys(method), "r": 4, "dropout": 0.1}
    tree["model"]["quantization"] = METHODS[method].quantization
    tree["training"]["learning_rate"] = 1e-3 if METHODS[method].full or "pissa" in name else 3e-2
    for key, value in keys.items():
        set_key(tree, key, value)
    config, run = write_config(tmp_path, tree), tmp_path / "run"
    assert run_command("train", ["--config", config]) == 0
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert min(losses[1:]) < losses[0]
    whole = load_file(run / "adapter" / "adapter_model.safetensors")
    words = ["--config", config, "--resume", str(run / "checkpoints" / "step-2")]
    assert run_command("train", words) == 0
    resumed = load_file(run / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
    assert run_command("evaluate", ["--run", str(run), "--limit", "2"]) == 0
    assert run_command("export", ["--run", str(run), "--output", str(tmp_path / "out")]) == 0
    assert "verified: plain transformers loads it" in capsys.readouterr().out
    onto = ["--run", str(run), "--output", str(tmp_path / "original"), "--onto", "original"]
    assert run_command("export", onto) == (2 if METHODS[method].full else 0)


@pytest.mark.real_model
def test_the_real_model_learns_in_three_steps(tmp_path):
    """Catches: anything between the packaged model and the export that a tiny random model hides."""
    run = tmp_path / "run"
    words = ["--config", "configs/quickstart.yaml", "--set", f"output.dir={run}"]
    words += ["--set", "training.max_steps=3", "--set", "training.batch_size=4"]
    # As many examples as a batch holds: every step sees the same ones, so the loss must fall.
    words += ["--set", "data.train.count=4", "--set", "training.warmup_steps=0"]
    words += ["--set", "training.save_every=3", "--set", "data.test.count=4"]
    finish(start("launch/train.py", *words, launcher=True), timeout=400)
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    scores = ["--run", str(run), "--set", "evaluation.max_new_tokens=8"]
    finish(start("launch/evaluate.py", *scores, launcher=True), timeout=400)
    assert (run / "evaluation" / "synthetic.json").is_file()
    output = finish(
        start("launch/export.py", "--run", str(run), "--output", str(tmp_path / "out")), timeout=400
    )
    assert "verified: plain transformers loads it" in output
