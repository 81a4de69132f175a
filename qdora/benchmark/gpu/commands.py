"""The real commands as processes: sharded runs against an unsharded one, the tests, the demo."""

from __future__ import annotations

import math
import os
import shlex
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import load_file

from qdora.benchmark.gpu.models import write_tiny_model
from qdora.benchmark.gpu.run import Figures, OutOfTimeError, Setup, SkipStageError, attempt
from qdora.config_file import QUICKSTART, SHIPPED, dump_config, find_shipped, load_config
from qdora.evaluation.scores import read_reports
from qdora.files import write_text
from qdora.run import RunDirectory
from qdora.training.metrics import StepMetrics, read_metrics

ROOT = Path(__file__).parents[3]

STEPS = 8
"""Of the sharded runs; they stop after half of them and are resumed."""
PROCESSES = 8
"""That share the tests on a GPU."""
CPU_CORRECT, CPU_TOTAL = 82, 128
"""The demo's exact match on a CPU, README.md."""


def fsdp(setup: Setup, figures: Figures) -> None:
    """FSDP2 with one process, also with CPU offload: train, save, resume, and end as without sharding.

    The three chains of processes run at the same time: starting them takes most of the time.
    """
    write_tiny_model(setup.folder / "tiny")
    chains = {
        "alone": (),
        "fsdp": _launch(setup),
        "offload": (*_launch(setup), "--fsdp_offload_params", "true"),
    }
    with ThreadPoolExecutor(len(chains)) as pool:
        runs = {name: pool.submit(_train, setup, name, launch) for name, launch in chains.items()}
    ended: dict[str, Run] = {}
    for name, future in runs.items():
        with attempt(figures, name):
            ended[name] = future.result()
    rows = figures["fsdp"] = []
    for name in [name for name in ended if name != "alone" and "alone" in ended]:
        difference = ended[name].differences(ended["alone"])
        rows.append({"run": name, **difference, "ok": max(difference.values()) <= 1e-4})


def _launch(setup: Setup) -> tuple[str, ...]:
    file = "fsdp" if setup.device.type == "cuda" else "fsdp_cpu"
    words = (
        "--config_file",
        str(find_shipped(f"{SHIPPED}accelerate/{file}")),
        "--num_processes",
        "1",
        "--main_process_port",
        "0",
    )
    return ("-m", "accelerate.commands.launch", "--quiet", *words)


@dataclass(frozen=True)
class Run:
    """What a training run left."""

    metrics: Sequence[StepMetrics]
    adapter: Mapping[str, torch.Tensor]

    def differences(self, other: Run) -> dict[str, float]:
        """The greatest relative one of a step's loss and gradient norm; of the adapter the norm."""
        if [m.step for m in self.metrics] != [m.step for m in other.metrics]:
            raise ValueError(f"steps {[m.step for m in self.metrics]} and {[m.step for m in other.metrics]}")
        if self.adapter.keys() != other.adapter.keys():
            raise ValueError(f"tensors {sorted(self.adapter)} and {sorted(other.adapter)}")
        pairs = list(zip(self.metrics, other.metrics, strict=True))
        squares = [
            (float((self.adapter[n].double() - t.double()).square().sum()), float(t.double().square().sum()))
            for n, t in other.adapter.items()
        ]
        return {
            "loss": max(abs(a.loss / b.loss - 1) for a, b in pairs),
            "gradient norm": max(abs(a.grad_norm / b.grad_norm - 1) for a, b in pairs),
            "adapter": math.sqrt(sum(s for s, _ in squares) / sum(s for _, s in squares)),
        }


def _train(setup: Setup, name: str, launch: Sequence[str]) -> Run:
    """Train half of the steps and resume; without sharding all in one go."""
    folder = setup.folder / name
    config = load_config(
        QUICKSTART,
        [
            f"model.path={setup.folder / 'tiny'}",
            "model.dtype=float32",
            "adapter.dtype=float32",
            "data.train.count=64",
            "data.test.count=4",
            f"training.max_steps={STEPS}",
            "training.batch_size=4",
            "training.schedule=constant",
            "training.warmup_steps=0",
            f"training.save_every={STEPS // 2}",
            f"output.dir={folder / 'run'}",
        ],
    )
    folder.mkdir()
    write_text(folder / "config.yaml", dump_config(config))
    command = [sys.executable, *launch, "-m", "qdora", "train", "--config", str(folder / "config.yaml")]
    if launch:
        execute(setup, [*command, "--set", f"training.max_steps={STEPS // 2}"])
        command.append("--resume")
    execute(setup, command)
    run = RunDirectory(config.output.dir)
    return Run(read_metrics(run.metrics_file), load_file(run.adapter / "adapter_model.safetensors"))


def gpu_tests(setup: Setup, figures: Figures) -> None:
    """The tests that are marked `gpu`; only files that have some are collected."""
    files = [
        path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "pytest.mark.gpu" in path.read_text()
    ]
    if not files:
        raise SkipStageError("no test is marked gpu")
    report = setup.folder / "tests.xml"
    options = ["-m", "gpu", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    if setup.device.type == "cuda" and find_spec("xdist") is not None:
        options += ["-n", str(PROCESSES)]  # most of their time goes into compiling kernels
    options.append(f"--junitxml={report}")
    # pytest ends with 1 where a test failed, with 5 where all were left out.
    output = execute(setup, [sys.executable, "-m", "pytest", *options, *map(str, files)], codes=(0, 1, 2, 5))
    cases = ET.parse(report).getroot().iter("testcase")
    outcomes = [next((child.tag for child in case if child.tag != "system-out"), "passed") for case in cases]
    figures |= {outcome: outcomes.count(outcome) for outcome in ("passed", "failure", "error", "skipped")}
    if figures["failure"] or figures["error"]:
        raise RuntimeError(output[-6000:])


def demo(setup: Setup, figures: Figures) -> None:
    """`make demo` on the device: its time, and exact match against the CPU run's interval."""
    if setup.model is None:
        raise SkipStageError("it needs the 135M model's GGUF file: --model FILE")
    run, left = setup.folder / "demo", setup.clock.left
    changes = (f"model.path={setup.model.resolve()}", f"output.dir={run}", *setup.size.demo)
    words = [word for change in changes for word in ("--set", change)]
    command = [sys.executable, "-m", "qdora", "demo", *words, "--export", str(setup.folder / "export")]
    execute(setup, command)
    [before], [after] = (
        read_reports(folder) for folder in (RunDirectory(run).base_evaluation, RunDirectory(run).evaluation)
    )
    cpu = CPU_CORRECT / CPU_TOTAL
    # Two standard errors of the difference of two scores.
    interval = 2 * math.sqrt(cpu * (1 - cpu) / CPU_TOTAL + after.stderr**2)
    figures |= {
        "exact match before": before.score,
        "exact match after": after.score,
        "of": after.total,
        "on a CPU": cpu,
        "allowed difference": interval,
        "agrees": abs(after.score - cpu) <= interval,
        "demo, s": left - setup.clock.left,
    }


def execute(setup: Setup, command: Sequence[str], codes: Sequence[int] = (0,)) -> str:
    """Run a command in the checkout within the time that is left; its output.

    Raises: RuntimeError: another exit code; with the end of the output.
        OutOfTimeError: the time limit came; the process has been ended.
    """
    setup.clock.check()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    if setup.device.type == "cpu":
        environment["ACCELERATE_USE_CPU"] = "true"
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # a group of its own, which ends with all processes that it has started
    ) as process:
        try:
            output, _ = process.communicate(timeout=setup.clock.left)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            raise OutOfTimeError(
                f"the time limit came within {shlex.join(command)}:\n{output[-2000:]}"
            ) from None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode not in codes:
        raise RuntimeError(f"{shlex.join(command)} ended with {process.returncode}:\n{output[-6000:]}")
    return output
