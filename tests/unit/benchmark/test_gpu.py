"""The measurement on a GPU, at toy size on the CPU: its stages, its loop, its options."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qdora.benchmark.gpu import commands, run, steps
from qdora.benchmark.gpu.correctness import least_certain
from qdora.benchmark.gpu.goals import goals
from qdora.benchmark.gpu.run import Clock, OutOfTimeError, Setup, SkipStageError, attempt, run_stages
from qdora.benchmark.gpu.sizes import FULL, TOY
from qdora.benchmark.gpu.stages import STAGES
from qdora.benchmark.kept import Kept
from qdora.cli import run_command

ROOT = Path(__file__).parents[3]
PROCESSES = {"fsdp", "tests", "demo"}
"""Stages that start processes: tests/e2e/test_gpu_benchmark.py."""


@pytest.fixture
def setup(tmp_path) -> Setup:
    return Setup(torch.device("cpu"), TOY, Clock(60), tmp_path)


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def test_every_stage_of_this_process_runs(tmp_path):
    """Catches: a stage that is broken and would be found on a GPU that is paid for; a kernel's reference off
    its float64 bounds; figures that the goals do not find."""
    file = tmp_path / "gpu.json"
    names = [name for name in STAGES if name not in PROCESSES]
    assert run_command("benchmark", ["gpu", "--json", str(file), "--stages", ",".join(names)]) == 0
    written = read(file)
    figures = {record["stage"]: record["figures"] for record in written["stages"]}
    assert [(r["stage"], r["status"]) for r in written["stages"]] == [(name, "done") for name in names]
    assert all(row["ok"] for row in figures["correctness"]["kernels"])
    assert {row["layer"] for row in figures["correctness"]["kept"]} == {"qdora", "qlora", "dora", "lora"}
    assert len(figures["kernels"]["kernels"]) == 8 * len(TOY.shapes)
    assert len(figures["steps"]["steps"]) == 2 * len(TOY.batches) * len(steps.ARMS)
    assert len(figures["steps"]["ratios"]) == 2 * len(TOY.batches) * len(steps.PAIRS)
    assert figures["profile"]["launches"] > len(figures["profile"]["top"]) > 5
    assert [row["checkpointing"] for row in figures["training"]["training"]] == [False, True]
    assert all(row["tokens/s"] > 0 for row in figures["training"]["training"])
    assert [row["batch"] for row in figures["decoding"]["decoding"]] == list(TOY.decoding)
    # On a CPU there is no peak to hold the estimate against; the sharded runs are not among these stages.
    assert [g["goal"] for g in written["goals"] if g["got"] is None] == [
        "estimate within 10% of peak allocated",
        "sharded runs unlike the unsharded one: 0",
    ]


def test_the_full_size_is_llama_3_8b():
    """Catches: times of another model than the one that they are reported for."""
    from transformers import AutoConfig

    ours, published = FULL.config(), AutoConfig.from_pretrained(ROOT / "configs/models/llama-3-8b")
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    keys += ("num_key_value_heads", "rope_parameters", "rms_norm_eps", "tie_word_embeddings", "head_dim")
    assert {k: getattr(ours, k) for k in keys} == {k: getattr(published, k) for k in keys}
    sides = {(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)}
    assert set(FULL.shapes) == sides


def test_a_failing_stage_does_not_lose_the_others(setup):
    """Catches: an exception that ends the run, or drops what the stage had measured; a failure of a part that
    is taken for success, or hides the parts after it."""
    written = []

    def fails(_, figures):
        figures["first"] = 1
        raise ValueError("broken here")

    def fails_in_part(_, figures):
        with attempt(figures, "one"):
            raise ValueError("a part is broken")
        figures["other"] = 2

    def skips(_, figures):
        raise SkipStageError("no model")

    stages = {"a": fails, "b": fails_in_part, "c": skips, "d": lambda _, figures: figures.update(last=3)}
    records = run_stages(stages, setup, lambda r: written.append(json.loads(json.dumps(r))))
    assert [r["status"] for r in records] == ["failed", "failed", "skipped", "done"]
    assert [r["figures"].get(k) for r, k in zip(records, ("first", "other", "x", "last"), strict=True)] == [
        *(1, 2, None, 3)
    ]
    assert 'raise ValueError("broken here")' in records[0]["error"]
    assert "a part is broken" in records[1]["error"]
    assert records[2]["reason"] == "no model"
    assert [[r["status"] for r in w] for w in written[:3]] == [
        ["not begun"] * 4,
        ["failed"] + ["not begun"] * 3,
        ["failed"] * 2 + ["not begun"] * 2,
    ]


def test_the_time_limit_stops_within_a_stage_and_before_the_next(tmp_path):
    """Catches: a limit that is not kept, that loses the parts that were done, or counts as a failure."""
    setup = Setup(torch.device("cpu"), TOY, Clock(0.2), tmp_path)

    def long(setup, figures):
        rows = figures["rows"] = []
        for i in range(100):
            setup.clock.check()
            with attempt(figures, "part"):
                rows.append({"i": i})
                time.sleep(0.05)
                setup.clock.check()

    records = run_stages({"a": long, "b": long}, setup, lambda _: None)
    assert [r["status"] for r in records] == ["stopped", "skipped"]
    assert 0 < len(records[0]["figures"]["rows"]) < 10
    assert "0 s came" in records[0]["reason"]
    assert "errors" not in records[0]["figures"]
    assert records[1]["reason"] == "the time limit came before it"


ENDS = [("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL), ("hang()", 1)]


@pytest.mark.parametrize(("ends", "code"), ENDS)
def test_a_run_that_is_killed_or_hangs_leaves_what_was_done(tmp_path, ends, code):
    """Catches: a file that is written at the end only, or is torn by a kill; a kernel without an end that
    holds the device until somebody looks."""
    file = tmp_path / "gpu.json"
    script = f"""
import os, signal, threading
from qdora.benchmark.gpu import stages
from qdora.cli import main
from qdora.commands import benchmark
hang = threading.Lock().acquire
hang()
benchmark.GRACE = 0.5
stages.STAGES["kernels"] = lambda *_: {ends}
words = ["--stages", "ceilings,kernels,training", "--time-limit", "3"]
main(["benchmark", "gpu", "--json", {str(file)!r}, *words])
"""
    (tmp_path / "temporary").mkdir()
    ours = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path / "temporary")}
    environment = {**os.environ, **ours}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, timeout=120, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert code < 0 or "Timeout (0:00:03" in done.stderr
    stages = read(file)["stages"]
    assert [r["status"] for r in stages] == ["done", "not begun", "not begun"]
    assert stages[0]["figures"]["copy, bytes/s"] > 0
    assert {path.name for path in tmp_path.iterdir()} == {file.name, "temporary"}


def test_a_lost_device_goes_on_in_a_new_process(tmp_path, monkeypatch):
    """Catches: all later stages failing after an illegal access on the device; a new process that forgets
    what was done, the limit, or the model, or runs a stage twice."""
    file, model = tmp_path / "gpu.json", tmp_path / "model.gguf"
    model.touch()
    started = []

    def lost(_, figures):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setitem(STAGES, "ceilings", lost)
    monkeypatch.setattr(run, "_is_lost", lambda device: True)
    monkeypatch.setattr(os, "execv", lambda path, words: started.append(words) or sys.exit(0))
    names = "ceilings,kernels,demo"
    words = ["gpu", "--json", str(file), "--stages", names, "--time-limit", "77", "--model", str(model)]
    with pytest.raises(SystemExit):
        run_command("benchmark", words)
    [[_, script, *rest]] = started
    assert Path(script).is_file()
    assert rest[rest.index("--stages") + 1] == "kernels,demo"
    assert 60 < float(rest[rest.index("--time-limit") + 1]) < 77
    assert rest[rest.index("--model") + 1] == str(model)
    rest[rest.index("--stages") + 1] = "kernels"
    assert run_command("benchmark", rest) == 1
    ended = [(r["stage"], r["status"]) for r in read(file)["stages"]]
    assert ended == [("ceilings", "failed"), ("kernels", "done")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "gpu needs --json FILE"),
        (["--json", "f.json", "--stages", "step"], "there is no stage 'step'; did you mean 'steps'?"),
        (["--json", "f.json", "--time-limit", "0"], "--time-limit 0.0; allowed: seconds, above 0"),
        (["--json", "f.json", "--time-limit", "nan"], "--time-limit nan; allowed: seconds, above 0"),
        (["--json", "f.json", "--size", "full"], "--size full needs a CUDA device; allowed here: toy"),
        (["--json", "f.json", "--dtype", "float32"], "benchmark gpu has no --dtype; only layer and train"),
        (["--json", "f.json", "--set", "adapter.r=8"], "benchmark gpu has no --set; only train"),
        (["--json", "f.json", "--model", "nowhere.gguf"], "--model nowhere.gguf: there is no such file"),
    ],
)
def test_bad_options_are_refused(tmp_path, monkeypatch, capsys, words, message):
    """Catches: a traceback, or minutes on a GPU before a word is found wrong."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run_command("benchmark", ["gpu", *words]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_goals_hold_against_what_was_measured():
    """Catches: a goal that is met by what misses it, the other way round, or from another row."""
    step = {"batch": "1x2048", "checkpointing": False, "arm": "qdora"}
    kernel = {"shape": "4096x14336", "kernel": "tile s(W + cBA)"}
    figures = {
        "steps": {
            "ratios": [
                step | {"checkpointing": True, "peer": "peft qlora", "ratio": 9.0},
                step | {"peer": "peft qlora", "ratio": 0.7},
                step | {"peer": "peft qdora", "ratio": 0.6},
            ]
        },
        "kernels": {
            "kernels": [
                kernel | {"ms": 0.06, "TB/s": 2.3},
                {"shape": "14336x4096", "kernel": "output_gradients", "ms": 0.1, "TB/s": 1.9},
            ]
        },
        "profile": {"busy / wall": 0.93},
        "training": {"training": [{"batch": "1x2048", "checkpointing": False, "estimate / allocated": 0.85}]},
        "correctness": {
            "kept": [
                {"dropout": 0.1, "least certain one": 0.97},
                {"dropout": 0.0, "least certain one": 0.98},
                {"dropout": 0.0, "least certain one": None},
            ],
            "kernels": [{"ok": True}, {"ok": False}],
        },
        "fsdp": {"fsdp": [{"ok": True}, {"ok": True}]},
    }
    found = goals([{"stage": name, "figures": value} for name, value in figures.items()], FULL)
    assert [(g["got"], g["met"]) for g in found] == [
        (0.7, True),
        (0.6, False),
        (None, None),
        (0.06, True),
        (1.9, False),
        (0.93, True),
        (0.85, False),
        (0.97, True),
        (1, False),
        (0, True),
    ]


def test_shares_count_that_are_certain_or_nan():
    """Catches: a layer of NaN that meets the goal; noise of a few elements that misses it."""
    assert least_certain([Kept(0.97, 0.01), Kept(0.3, 0.4), Kept(1.0, 0.0)]) == 0.97
    assert least_certain([Kept(0.97, 0.01), Kept(math.nan, math.nan)]) == 0
    assert least_certain([Kept(0.3, 0.4)]) is None


def test_busy_time_counts_overlaps_once():
    """Catches: a device that is busy for longer than the step takes, where streams overlap."""
    spans = [(0, 4e6), (1e6, 2e6), (3e6, 5e6), (9e6, 10e6)]
    events = [SimpleNamespace(time_range=SimpleNamespace(start=a, end=b)) for a, b in spans]
    assert steps._busy_seconds(events) == pytest.approx(6)


def test_a_full_step_is_extrapolated_from_two_depths(setup, monkeypatch):
    """Catches: the output layer and the loss counted with every layer, or not at all."""
    low, high = TOY.depths
    seconds = {f"{arm}/{depth}": [10 + 3.0 * depth] for arm in steps.ARMS for depth in (low, high)}
    monkeypatch.setattr(steps, "alternate", lambda *_, **__: seconds)
    found = steps._full_steps(setup, {}, {}, 1, 8, False)
    assert found == {arm: [pytest.approx(10 + 3 * TOY.layers)] for arm in steps.ARMS}


def test_runs_are_compared_by_steps_and_tensors(setup):
    """Catches: a resumed run that lacks steps, or an adapter of other tensors, taken for equal."""

    def trained(losses, value):
        metrics = [SimpleNamespace(step=i, loss=loss, grad_norm=2.0) for i, loss in enumerate(losses)]
        return commands.Run(metrics, {"a": torch.tensor([3.0, value])})

    found = trained([2.0, 1.0], 4.0).differences(trained([2.0, 1.1], 4.5))
    assert found["loss"] == pytest.approx(0.1 / 1.1)
    assert found["gradient norm"] == 0
    assert found["adapter"] == pytest.approx(0.5 / math.hypot(3, 4.5))
    with pytest.raises(ValueError, match="steps"):
        trained([2.0], 4.0).differences(trained([2.0, 1.0], 4.0))


def test_a_command_ends_at_the_time_limit_with_its_children(tmp_path):
    """Catches: a training that keeps the device after the stage that started it has given up."""
    setup = Setup(torch.device("cpu"), TOY, Clock(1), tmp_path)
    child = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with pytest.raises(OutOfTimeError, match="came within"):
        commands.execute(setup, [sys.executable, "-c", parent])
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_command_that_fails_is_shown(setup):
    """Catches: a failed run taken for a done one, or its output lost."""
    with pytest.raises(RuntimeError, match="ended with 3:\nwhat went wrong"):
        commands.execute(setup, [sys.executable, "-c", "print('what went wrong'); raise SystemExit(3)"])
