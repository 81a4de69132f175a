"""`demo`: the real commands, one after the other, on the shipped quickstart, and one table of results."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from tabulate import tabulate

from qdora.config import RunConfig
from qdora.errors import InputError
from qdora.evaluation.scores import Scores, read_reports
from qdora.output import check_output
from qdora.run import RunDirectory
from qdora.training.metrics import read_metrics

ROOT = Path(__file__).parents[2]

# The launcher's defaults, spelled out so that it does not warn about having chosen them.
_ONE_PROCESS = ("--num_processes=1", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no")


def check(arguments: argparse.Namespace) -> None:
    """Raises: InputError: there is no checkout, or the export cannot be written."""
    if not (ROOT / "launch" / "train.py").is_file():
        raise InputError(
            "the demo runs the scripts in launch/; start it in a source checkout, as make demo does"
        )
    check_output(Path(arguments.export), overwrite=True)


def demo(arguments: argparse.Namespace, config: RunConfig) -> None:
    """Train, evaluate before and after, export, report."""
    started = time.perf_counter()
    overrides = [word for override in arguments.set for word in ("--set", override)]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", *_ONE_PROCESS]
    _step("Training", [*launch, "launch/train.py", "--config", arguments.config, *overrides])
    name = config.output.dir
    _step("Before training", [*launch, "launch/evaluate.py", "--run", name, "--base-only"])
    _step("After training", [*launch, "launch/evaluate.py", "--run", name])
    export = ["launch/export.py", "--run", name, "--output", arguments.export, "--overwrite"]
    _step("Export", [sys.executable, *export])
    print("\n" + summary(RunDirectory(name), Path(arguments.export), time.perf_counter() - started))


def summary(directory: RunDirectory, export: Path, seconds: float) -> str:
    """The table that the demo ends with."""
    [before], [after] = read_reports(directory.base_evaluation), read_reports(directory.evaluation)
    manifest = directory.manifest()
    steps = read_metrics(directory.metrics_file)
    trained = manifest["trainable_parameters"]
    total = trained + manifest["base"]["parameters"]
    speed = sum(m.tokens for m in steps) / sum(m.seconds for m in steps)
    rows = [
        ("exact match before", _percent(before)),
        ("exact match after", _percent(after)),
        ("gain", f"{100 * (after.score - before.score):+.1f} points"),
        ("trainable parameters", f"{trained:,} of {total:,} ({100 * trained / total:.2f}%)"),
        ("training speed", f"{speed:,.0f} tokens/s"),
        ("peak memory", f"{max(m.peak_memory_bytes for m in steps) / 2**30:.2f} GiB"),
        ("time", f"{seconds / 60:.1f} minutes"),
        ("run", directory.path),
        ("adapter", directory.adapter),
        ("loss plot", directory.loss_plot),
        ("merged fp16 weights", export),
    ]
    return tabulate(rows, tablefmt="rounded_outline", disable_numparse=True)


def _step(title: str, command: list[str]) -> None:
    print(f"\n== {title}: {' '.join(command[1:])}", file=sys.stderr, flush=True)
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    if code:
        raise InputError(f"{title.lower()} ended with exit code {code}")


def _percent(scores: Scores) -> str:
    return f"{100 * scores.score:.1f}% ± {100 * scores.stderr:.1f}  ({scores.correct}/{scores.total})"
