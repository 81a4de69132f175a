"""The real commands under the shipped launch file for two sharded CPU processes: train, kill, go on with
other numbers of processes, evaluate."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from qdora.cli import run_command
from qdora.training.checkpoint import list_checkpoints
from tests.e2e.runs import finish, metrics, start, tiny_tree, write_config

pytestmark = pytest.mark.e2e

STEPS = 40
LAUNCH = ("-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/fsdp_cpu.yaml")


def configuration(folder: Path, model: Path) -> str:
    folder.mkdir(exist_ok=True)
    tree = tiny_tree(folder, model, max_steps=STEPS, save_every=5, keep_checkpoints=3)
    # A gate is a parameter of one number, of which the later ranks have none.
    tree["adapter"] |= {"dropout": 0.0, "dtype": "float32", "type": "gated_lora"}
    tree["adapter"]["magnitude_start"] = "original"
    tree["data"]["train"]["limit"] = 90  # the last batch of an epoch is uneven
    return write_config(folder, tree)


def launch(config: str, *more: str, processes: int = 2) -> subprocess.Popen[str]:
    return start(
        *LAUNCH, "--quiet", "--num_processes", str(processes), "launch/train.py", "--config", config, *more
    )


def wait_for_steps(run: Path, steps: int, process: subprocess.Popen[str]) -> None:
    lines = run / "metrics.jsonl"
    deadline = time.monotonic() + 150
    while not (lines.exists() and len(lines.read_text().splitlines()) >= steps):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ranks(launcher: subprocess.Popen[str]) -> list[psutil.Process]:
    """The training processes of a launcher, by rank."""
    children = psutil.Process(launcher.pid).children(recursive=True)
    training = [c for c in children if "launch/train.py" in c.cmdline() and "RANK" in c.environ()]
    return sorted(training, key=lambda c: int(c.environ()["RANK"]))


def assert_close(run: Path, reference: Path) -> None:
    ours, theirs = metrics(run), metrics(reference)
    assert [m["step"] for m in ours] == [m["step"] for m in theirs] == list(range(1, STEPS + 1))
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
        assert (a["lr"], a["tokens"]) == (b["lr"], b["tokens"])
    got = load_file(run / "adapter" / "adapter_model.safetensors")
    for name, expected in load_file(reference / "adapter" / "adapter_model.safetensors").items():
        assert float((got[name] - expected).norm() / expected.norm()) < 1e-4, name


def test_two_then_one_then_four_processes_reach_the_numbers_of_one(tmp_path, tiny_model_folder):
    """Catches: a survivor of a kill that hangs or ends without a word; a checkpoint that only as many
    processes can read as wrote it; moments, masters, schedule or data order that change with the number of
    processes; an adapter or an evaluation of a sharded run that differs from one process's."""
    reference = configuration(tmp_path / "reference", tiny_model_folder)
    assert run_command("train", ["--config", reference]) == 0
    config = configuration(tmp_path / "sharded", tiny_model_folder)
    run = tmp_path / "sharded" / "run"

    two = launch(config)
    wait_for_steps(run, 12, two)
    os.kill(ranks(two)[1].pid, signal.SIGKILL)
    killed = time.monotonic()
    output = two.communicate(timeout=60)[0]
    assert two.returncode != 0
    assert time.monotonic() - killed < 45
    assert "another process of this run has ended or does not answer" in output
    stopped = int(list_checkpoints(run / "checkpoints")[0].name.removeprefix("step-"))
    assert stopped >= len(metrics(run)) - 5

    one = start("launch/train.py", "--config", config, "--resume")
    wait_for_steps(run, stopped + 8, one)
    one.send_signal(signal.SIGTERM)
    output = finish(one, code=128 + signal.SIGTERM)
    assert f"resuming after step {stopped}, written by 2 processes" in output

    output = finish(launch(config, "--resume", processes=4))
    assert "Traceback" not in output
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["resumed"][0]["step"] == stopped
    assert len(manifest["resumed"]) == 2
    assert_close(run, tmp_path / "reference" / "run")

    evaluated = start(*LAUNCH, "--quiet", "launch/evaluate.py", "--run", str(run))
    assert "exact match" in finish(evaluated)
    alone = str(tmp_path / "alone")
    assert run_command("evaluate", ["--run", str(run), "--output", alone]) == 0
    predictions = [
        (Path(folder) / "sums.predictions.jsonl").read_text() for folder in (run / "evaluation", alone)
    ]
    assert predictions[0] == predictions[1]
