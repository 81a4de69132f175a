"""Training that is killed, stopped or starved, and goes on to the same numbers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from qdora import files
from qdora.adapters import peft_io
from qdora.cli import run_command
from qdora.errors import InputError
from qdora.experiments import plots
from qdora.run import RunDirectory
from qdora.training.checkpoint import list_checkpoints

from .runs import finish, metrics, start, tiny_tree, write_config

pytestmark = pytest.mark.e2e
STEPS = 40


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny_model_folder) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    tree = tiny_tree(folder, tiny_model_folder, max_steps=STEPS, save_every=5, keep_checkpoints=3)
    finish(start("launch/train.py", "--config", write_config(folder, tree)))
    return folder / "run"


def interrupt(folder: Path, model: Path, send: int, launcher: bool) -> tuple[subprocess.Popen[str], str]:
    """Start the same run elsewhere and send a signal to the training process after some steps."""
    tree = tiny_tree(folder, model, max_steps=STEPS, save_every=5, keep_checkpoints=3)
    config = write_config(folder, tree)
    process = start("launch/train.py", "--config", config, launcher=launcher)
    lines = folder / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (lines.exists() and len(lines.read_text().splitlines()) >= 12):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(send)
    return process, config


def assert_same(run: Path, reference: Path) -> None:
    assert metrics(run) == metrics(reference)
    ours = load_file(run / "adapter" / "adapter_model.safetensors")
    theirs = load_file(reference / "adapter" / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(ours[k].equal(theirs[k]) for k in ours)


def test_sigterm_writes_a_checkpoint_and_resume_reaches_the_same_numbers(
    tmp_path, tiny_model_folder, uninterrupted
):
    """Catches: a stop that loses steps, or a continuation with other batches, dropout or moments."""
    process, config = interrupt(tmp_path, tiny_model_folder, signal.SIGTERM, launcher=False)
    output = finish(process, code=128 + signal.SIGTERM)
    assert "a checkpoint was written; continue with --resume" in output
    assert "Traceback" not in output
    stopped = int(list_checkpoints(tmp_path / "run" / "checkpoints")[0].name.removeprefix("step-"))
    assert 12 <= stopped < STEPS
    assert len(metrics(tmp_path / "run")) == stopped
    output = finish(start("launch/train.py", "--config", config, "--resume"))
    assert f"resuming after step {stopped}" in output
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert [entry["step"] for entry in manifest["resumed"]] == [stopped]
    assert_same(tmp_path / "run", uninterrupted)


def test_kill_9_loses_at_most_the_steps_since_the_checkpoint(tmp_path, tiny_model_folder, uninterrupted):
    """Catches: a checkpoint that is only whole if the process ends in an orderly way."""
    process, config = interrupt(tmp_path, tiny_model_folder, signal.SIGKILL, launcher=False)
    process.communicate()
    newest = list_checkpoints(tmp_path / "run" / "checkpoints")[0]
    # A damaged newest checkpoint is named, and the one before it is used.
    state = newest / "state-0.safetensors"
    state.write_bytes(state.read_bytes()[:-50])
    output = finish(start("launch/train.py", "--config", config, "--resume", "auto"))
    assert f"{state}: corrupt" in output
    assert "resuming after step" in output
    assert_same(tmp_path / "run", uninterrupted)


def test_a_launcher_that_is_stopped_takes_its_run_with_it(tmp_path, tiny_model_folder):
    """Catches: a training process that lives on, or loses its work, when its launcher is gone."""
    process, _ = interrupt(tmp_path, tiny_model_folder, signal.SIGTERM, launcher=True)
    process.communicate(timeout=60)
    # The launcher does not pass the signal on; the training process sees that it is gone.
    deadline = time.monotonic() + 60
    lines = tmp_path / "run" / "metrics.jsonl"
    while time.monotonic() < deadline:
        found = list_checkpoints(tmp_path / "run" / "checkpoints")
        if found and int(found[0].name.removeprefix("step-")) % 5:
            break
        time.sleep(0.1)
    steps = len(lines.read_text().splitlines())
    time.sleep(1)
    assert len(lines.read_text().splitlines()) == steps < STEPS


def test_metrics_are_on_the_disk_before_the_checkpoint_of_their_steps(
    tmp_path, tiny_model_folder, monkeypatch
):
    """Catches: a power cut that leaves a checkpoint, and not the lines of the steps before it, which no
    resumed run writes again."""
    seen: list[tuple[str, int]] = []
    fsync, lines = os.fsync, tmp_path / "run" / "metrics.jsonl"

    def watched(handle: int) -> None:
        name = Path(f"/proc/self/fd/{handle}").readlink().name
        if name in ("metrics.jsonl", "checkpoints"):
            seen.append((name, len(lines.read_text().splitlines())))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", watched)
    tree = tiny_tree(tmp_path, tiny_model_folder, max_steps=5, save_every=2)
    assert run_command("train", ["--config", write_config(tmp_path, tree)]) == 0
    assert seen == [(name, step) for step in (2, 4, 5) for name in ("metrics.jsonl", "checkpoints")]


@pytest.mark.parametrize("fails", ["loss.png", "adapter_config.json", "adapter_model.safetensors"])
def test_a_run_without_one_of_its_last_files_is_not_finished(tmp_path, tiny_model_folder, monkeypatch, fails):
    """Catches: a run that `compare` takes for finished, without its plot or half of its adapter, because it
    was killed, or its disk was full, in the middle of the last files."""
    write_file = files.write_file

    def full(path: Path, write: Callable[[Path], object]) -> None:
        if path.name == fails and "checkpoints" not in path.parts:
            raise InputError(f"{path}: cannot be written: No space left on device")
        write_file(path, write)

    tree = tiny_tree(tmp_path, tiny_model_folder, max_steps=2)
    words = ["--config", write_config(tmp_path, tree)]
    run = RunDirectory(tmp_path / "run")
    with monkeypatch.context() as patched:
        for module in (files, plots, peft_io):
            patched.setattr(module, "write_file", full)
        assert run_command("train", words) == 2
    with pytest.raises(InputError, match="the run has no adapter, it was not finished"):
        run.finished_adapter()
    assert run_command("train", [*words, "--resume"]) == 0
    assert {path.name for path in (*run.path.iterdir(), *run.finished_adapter().iterdir())} >= {fails}


def test_resume_refuses_other_settings(uninterrupted, capsys):
    """Catches: a run continued with another rank or learning rate, which no number would show."""
    config = str(uninterrupted.parent / "config.yaml")
    words = ["--config", config, "--resume", "--set", "training.learning_rate=0.5"]
    assert run_command("train", words) == 2
    assert "written with training.learning_rate = 0.001, this run has 0.5" in capsys.readouterr().err


def test_no_space_left_is_said_and_older_checkpoints_stay(tmp_path, tiny_model_folder):
    """Catches: a traceback, or a half-written checkpoint, where the disk is full."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        tree = tiny_tree(tmp_path, tiny_model_folder, max_steps=12, save_every=1, keep_checkpoints=9)
        tree["output"]["dir"] = str(disk / "run")
        output = finish(start("launch/train.py", "--config", write_config(tmp_path, tree)), code=2)
        assert "No space left on device" in output
        assert "Traceback" not in output
        names = {path.name for path in (disk / "run" / "checkpoints").iterdir()}
        assert names
        assert all(name.startswith("step-") for name in names)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_checkpoints_that_cannot_be_read_stay(tmp_path, uninterrupted, capsys):
    """Catches: a run that starts over and removes the checkpoints of weeks, because a disk was away."""
    shutil.copytree(uninterrupted, tmp_path / "run")
    for state in (tmp_path / "run" / "checkpoints").glob("*/state-0.safetensors"):
        state.write_bytes(b"")
    words = ["--config", str(uninterrupted.parent / "config.yaml"), "--resume"]
    assert run_command("train", [*words, "--set", f"output.dir={tmp_path / 'run'}"]) == 2
    assert "none of its checkpoints (step-40, step-35, step-30) can be used" in capsys.readouterr().err
    assert len(list_checkpoints(tmp_path / "run" / "checkpoints")) == 3


def test_filled_rows_go_on_where_they_were(tmp_path, tiny_model_folder, capsys):
    """Catches: steps that are counted in examples where rows hold several, an order of rows with memory, a
    run that goes on with other rows, a step that is reported with the tokens of another."""
    trees = {}
    for name in ("straight", "stopped"):
        (tmp_path / name).mkdir()
        tree = tiny_tree(tmp_path / name, tiny_model_folder, batch_size=2, schedule="constant", epochs=2.0)
        tree["training"].pop("max_steps")
        tree["data"] |= {"packing": "stream", "max_length": 256}
        trees[name] = write_config(tmp_path / name, tree)
    assert run_command("train", ["--config", trees["straight"]]) == 0
    said = capsys.readouterr().err
    assert "none is padding; rows are filled to " in said
    straight = metrics(tmp_path / "straight" / "run")
    manifest = json.loads((tmp_path / "straight" / "run" / "manifest.json").read_text())
    assert manifest["steps"] == len(straight)
    half = len(straight) // 2
    assert sum(m["tokens"] for m in straight[:half]) == sum(m["tokens"] for m in straight[half:])
    assert all(m["tokens"] <= 2 * 256 for m in straight)
    once = ["--config", trees["stopped"], "--set", "training.epochs=0.6"]
    assert run_command("train", once) == 0
    again = ["--config", trees["stopped"], "--resume"]
    for change in ("data.max_length=255", "data.packing=batch"):
        assert run_command("train", [*again, "--set", change]) == 2
        assert "data.max_length of filled rows (data.packing: stream) = 256" in capsys.readouterr().err
    assert run_command("train", again) == 0
    assert metrics(tmp_path / "stopped" / "run") == straight
