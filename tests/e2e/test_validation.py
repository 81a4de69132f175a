"""Validation in real runs: what is written, kept, resumed and scored; on one and on two processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from qdora.cli import run_command
from qdora.run import RunDirectory
from qdora.training.metrics import read_metrics, read_validations
from tests.distributed.ranks import ROOT, ends, fork_ranks

from .runs import tiny_tree, write_config

pytestmark = pytest.mark.e2e


def tree_of(folder: Path, model: Path, **training):
    folder.mkdir(exist_ok=True)
    tree = tiny_tree(folder, model, **{"max_steps": 8, "learning_rate": 5e-3} | training)
    tree["data"]["validation"] = 12
    tree["evaluation"]["loss_every"] = 2
    return tree


def train(folder: Path, tree, *words: str) -> RunDirectory:
    assert run_command("train", ["--config", write_config(folder, tree), *words]) == 0
    return RunDirectory(tree["output"]["dir"])


def numbers(run: RunDirectory):
    return [(m.step, m.loss, m.grad_norm) for m in read_metrics(run.metrics_file)]


def validations(run: RunDirectory):
    return [(m.step, m.validation_loss, m.validation_losses) for m in read_validations(run.metrics_file)]


def weights(folder: Path):
    return {k: v.tolist() for k, v in load_file(folder / "adapter_model.safetensors").items()}


def test_a_run_with_validation(tmp_path, tiny_model_folder, capsys):
    """Catches: a curve that changes with validation, a best adapter of another step, a manifest, a table or a
    report that says something else; --best that scores the last adapter, or writes over its reports."""
    plain = tree_of(tmp_path / "plain", tiny_model_folder)
    del plain["evaluation"]["loss_every"]
    without = train(tmp_path / "plain", plain)
    run = train(
        tmp_path / "run", tree_of(tmp_path / "run", tiny_model_folder, keep_best="loss", save_every=2)
    )
    assert numbers(run) == numbers(without)
    assert weights(run.adapter) == weights(without.adapter)
    assert [step for step, *_ in validations(run)] == [0, 2, 4, 6, 8]
    step, value, _ = min(validations(run), key=lambda found: found[1])
    best = run.manifest()["best"]
    assert best == {"step": step, "measure": "loss", "value": value}
    shown = capsys.readouterr()
    assert f"{run.best_adapter}, of step {step}" in shown.out
    assert f"qdora evaluate --run {run.path} [--best]" in shown.out
    assert f"step 0: validation loss {validations(run)[0][1]:.4f}\n" in shown.err
    kept = run.checkpoints / f"step-{step}" / "adapter"
    if kept.is_dir():
        assert weights(run.best_adapter) == weights(kept)
    assert run_command("evaluate", ["--run", str(run.path), "--best", "--limit", "2"]) == 0
    assert {path.name for path in run.best_evaluation.glob("*.json")} == {"sums.json"}
    assert not run.evaluation.exists()
    assert run_command("evaluate", ["--run", str(without.path), "--best"]) == 2
    assert "has no adapter-best; a run keeps it with training.keep_best" in capsys.readouterr().err


def test_a_resumed_run_knows_its_best_and_its_patience(tmp_path, tiny_model_folder):
    """Catches: a best adapter or a count of validations lost with the process, or taken from steps that
    the run has gone back from."""
    # No answer is right: the best adapter is the first, and the last validations count.
    options = {"keep_best": "exact_match", "patience": 4, "save_every": 2, "keep_checkpoints": 9}
    trees = {name: tree_of(tmp_path / name, tiny_model_folder, max_steps=12, **options) for name in "ab"}
    for tree in trees.values():
        tree["evaluation"]["max_new_tokens"] = 2
    whole, run = (train(tmp_path / name, tree) for name, tree in trees.items())
    assert (whole.manifest()["best"]["step"], whole.manifest()["stopped_early"]) == (0, 8)
    for step in (2, 4, 6):
        # As a kill would leave it, with the best adapter of a later step.
        (run.best_adapter / "adapter_model.safetensors").write_bytes(b"of a later step")
        run.record(best={"step": 99, "measure": "exact_match", "value": 1.0})
        again = train(tmp_path / "b", trees["b"], "--resume", str(run.checkpoints / f"step-{step}"))
        assert numbers(again) == numbers(whole)
        assert validations(again) == validations(whole)
        assert weights(again.best_adapter) == weights(whole.best_adapter)
        assert again.manifest()["best"] == whole.manifest()["best"]
        assert again.manifest()["stopped_early"] == 8


def test_the_best_by_generated_answers_and_an_early_stop(tmp_path, tiny_model_folder, capsys):
    """Catches: exact match that is not measured on the validation examples, is cut by the limit of the test
    set, or has no reports; a stop that is not said; a stopped run that counts as unfinished, a finished one
    that is said to have stopped."""
    tree = tree_of(tmp_path / "run", tiny_model_folder, keep_best="exact_match", patience=2)
    tree["evaluation"] |= {"limit": 3, "max_new_tokens": 4}
    run = train(tmp_path / "run", tree)
    shown = capsys.readouterr()
    assert [m.validation_exact_match for m in read_validations(run.metrics_file)] == [0.0, 0.0, 0.0]
    assert run.manifest()["best"] == {"step": 0, "measure": "exact_match", "value": 0.0}
    assert (run.manifest()["stopped_early"], len(numbers(run))) == (4, 4)
    assert "step 4: stopping early, the last 2 validations were no better than that after step 0" in shown.err
    assert "4 of 8, stopped early" in shown.out
    report = json.loads((run.validation / "step-4" / "sums.json").read_text())
    assert report["total"] == 12
    tree["training"]["max_steps"], tree["output"]["overwrite"] = 4, True
    assert "stopped_early" not in train(tmp_path / "run", tree).manifest()
    assert "stopping early" not in capsys.readouterr().err


@pytest.mark.distributed
@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_validate_as_one(tmp_path, tiny_model_folder, sharded):
    """Catches: validation examples counted twice or by one rank alone, ranks that stop at different steps, a
    collective that one rank does not come to, training numbers that change with validation."""
    one = tree_of(tmp_path / "one", tiny_model_folder, keep_best="loss", patience=3)
    one["adapter"] |= {"dropout": 0.0, "dtype": "float32"}
    single = train(tmp_path / "one", one)
    words = []
    for name in ("with", "without"):
        tree = tree_of(tmp_path / name, tiny_model_folder, keep_best="loss", patience=3)
        tree["adapter"] |= one["adapter"]
        if name == "without":
            del tree["evaluation"]["loss_every"], tree["training"]["keep_best"], tree["training"]["patience"]
        words.append(["launch/train.py", "--config", write_config(tmp_path / name, tree)])
    kind = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} if sharded else {}
    for command in words:
        for code, output in ends(fork_ranks([command] * 2, [ROOT] * 2, ACCELERATE_USE_CPU="true", **kind)):
            assert code == 0, output[-3000:]
    run, without = RunDirectory(tmp_path / "with" / "run"), RunDirectory(tmp_path / "without" / "run")
    assert numbers(run) == numbers(without)[: len(numbers(run))]
    ours, theirs = validations(run), validations(single)
    assert [step for step, *_ in ours] == [step for step, *_ in theirs]
    assert [loss for _, loss, _ in ours] == pytest.approx([loss for _, loss, _ in theirs], rel=1e-4)
    assert run.manifest()["best"]["step"] == single.manifest()["best"]["step"]
    assert weights(run.best_adapter).keys() == weights(single.best_adapter).keys()
