"""A run whose rows are read as it trains, from a folder in the hub's layout."""

from __future__ import annotations

import pytest
import yaml

from qdora.cli import run_command
from qdora.run import RunDirectory
from qdora.training.metrics import read_metrics

from .runs import tiny_tree, write_config, write_questions

pytestmark = pytest.mark.e2e


@pytest.fixture
def tree(tmp_path, tiny_model_folder):
    tree = tiny_tree(tmp_path, tiny_model_folder, max_steps=7, save_every=3, keep_checkpoints=9)
    data = tmp_path / "hub" / "data"
    data.mkdir(parents=True)
    for part in range(2):
        write_questions(data / f"train-0000{part}-of-00002.jsonl", 20, offset=20 * part)
    source = {"source": "hub", "path": str(tmp_path / "hub"), "streaming": True, "shuffle_buffer": 10}
    tree["data"] |= {"train": source, "validation": {**tree["data"]["test"], "name": "own"}}
    tree["data"]["validation"]["path"] = str(write_questions(tmp_path / "own.jsonl", 5, offset=30))
    tree["evaluation"] |= {"loss_every": 3}
    return tree


def train(folder, tree, *words):
    assert run_command("train", ["--config", write_config(folder, tree), *words]) == 0
    return RunDirectory(tree["output"]["dir"])


def numbers(run):
    return [(m.step, m.loss, m.grad_norm, m.tokens) for m in read_metrics(run.metrics_file)]


def test_a_run_goes_on_at_its_place_in_the_stream(tmp_path, tree, capsys):
    """Catches: a resumed run that begins the stream anew, or skips the batch that was read ahead; more passes
    than rows refused; a manifest that counts the first rows as the training set."""
    run = train(tmp_path, tree)
    expected = numbers(run)
    assert len(expected) == 7
    shown = capsys.readouterr()
    assert "training examples are streamed; what follows is of the first rows of them" in shown.err
    assert "5 for their question, 0 that cannot be used (first pass)" in shown.out
    assert "35 examples; 0 removed because their question is a test question" in shown.err
    for step in (3, 6):
        train(tmp_path, tree, "--resume", str(run.checkpoints / f"step-{step}"))
        assert numbers(run) == expected
    counts = run.manifest()["data"]
    assert (counts["train"], counts["streamed"], counts["validation"]) == (None, True, 5)
    capsys.readouterr()
    other = ["--set", "data.train.shuffle_buffer=11", "--resume"]
    assert run_command("train", ["--config", write_config(tmp_path, tree), *other]) == 2
    assert "data.train" in capsys.readouterr().err


def test_data_shows_the_first_rows(tmp_path, tree, capsys):
    """Catches: a look at the data that reads the stream to its end, or plans an epoch of its first rows."""
    assert run_command("data", ["--config", write_config(tmp_path, tree), "--show", "1"]) == 0
    shown = capsys.readouterr().out
    assert "35 examples" in shown
    assert "an epoch has" not in shown
    assert shown.count("[[") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("training={epochs: 1, batch_size: 8}", "set training.max_steps, not training.epochs"),
        ("evaluation.shots=2", "evaluation.shots 2 are drawn from the full training set"),
        ("data.train={source: file, path: x, streaming: true}", "streaming belongs to source 'hub'"),
    ],
)
def test_what_needs_all_rows_is_refused(tmp_path, tree, capsys, change, message):
    """Catches: a key that is silently without effect on a stream."""
    tree["training"].pop("save_every")
    assert run_command("train", ["--config", write_config(tmp_path, tree), "--set", change]) == 2
    assert message in capsys.readouterr().err


def test_arms_are_not_compared_on_a_stream(tmp_path, tree, capsys):
    """Catches: arms on training sets whose fingerprints say nothing of what they will be trained on."""
    base = write_config(tmp_path, tree)
    comparison = tmp_path / "compare.yaml"
    arms = [{"name": "qlora", "set": {"adapter.dora": False}}, {"name": "qdora"}]
    comparison.write_text(
        yaml.safe_dump({"base": base, "arms": arms, "output": {"dir": str(tmp_path / "c")}})
    )
    assert run_command("compare", ["--config", str(comparison)]) == 2
    assert "data.train.streaming: arms are compared on a known set" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()
