"""Where the start of a command goes: import times by package, and medians of whole commands.

    python -m tools.import_times                              seconds of whole commands
    python -m tools.import_times qdora.commands.train         packages that a module brings, with a bar each

Seconds of whole commands are wall time and CPU time: beside other work only the second says something. Times
of packages are those of `python -X importtime`, which itself costs a tenth; a package's own are those of its
modules without what these import in turn.
"""

from __future__ import annotations

import argparse
import re
import resource
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from os import environ
from pathlib import Path

ROOT = Path(__file__).parents[1]
TRAIN = ("launch/train.py", "--config", "configs/quickstart.yaml")
ESTIMATE = ("--config", "configs/llama3-8b-orca-math.yaml", "--gpus", "2", "--gpu-memory", "24GiB")
QDORA = ("-c", "import sys; from qdora.cli import main; main(sys.argv[1:])")
COMMANDS: dict[str, tuple[str, ...]] = {
    "qdora --help": (*QDORA, "--help"),
    "qdora train --help": (*QDORA, "train", "--help"),
    "an unknown command": (*QDORA, "trian"),
    "a bad option": (*TRAIN, "--bogus"),
    "a misspelt key": (*TRAIN, "--set", "training.max_stps=3"),
    "a contradiction": (*TRAIN, "--set", "adapter.dora=false", "--set", "adapter.magnitude_targets=[q_proj]"),
    "import qdora.commands.train": ("-c", "import qdora.commands.train"),
    "qdora estimate": (*QDORA, "estimate", *ESTIMATE),
}
SPLIT = ("torch", "transformers", "qdora")
"""Packages of which the parts are told apart."""
BAR = 40
_OURS = {**environ, "PYTHONPATH": str(ROOT)}
_LINE = re.compile(r"import time:\s+(\d+) \|\s+\d+ \| +(\S+)")


def seconds(words: Sequence[str]) -> tuple[float, float]:
    """Wall time and CPU time of one Python process."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *words], cwd=ROOT, env=_OURS, capture_output=True, check=False)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def packages(module: str) -> Counter[str]:
    """Own seconds of every package that a module imports."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", f"import {module}"],
        cwd=ROOT,
        env=_OURS,
        capture_output=True,
        text=True,
        check=True,
    )
    own: Counter[str] = Counter()
    for microseconds, name in _LINE.findall(done.stderr):
        parts = name.split(".")
        own[".".join(parts[:2] if parts[0] in SPLIT else parts[:1])] += int(microseconds)
    return Counter({name: total / 1e6 for name, total in own.items()})


def show_packages(module: str, rounds: int, rows: int) -> None:
    """Medians, the most expensive first."""
    runs = [packages(module) for _ in range(rounds)]
    medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    ranked = sorted(medians.items(), key=lambda item: -item[1])
    longest = ranked[0][1]
    for name, own in ranked[:rows]:
        print(f"{own:7.3f} s  {name:<32} {'█' * round(BAR * own / longest)}")
    print(f"{sum(own for _, own in ranked[rows:]):7.3f} s  {len(ranked[rows:])} others")
    print(f"{sum(medians.values()):7.3f} s  all")


def show_commands(rounds: int) -> None:
    """Medians, every command once a round: so a busy moment does not fall on one of them."""
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in COMMANDS}
    for _ in range(rounds):
        for name, words in COMMANDS.items():
            measured[name].append(seconds(words))
    print(f"{'':<30}{'wall, s':>9}{'CPU, s':>9}")
    for name, runs in measured.items():
        wall, cpu = (statistics.median(run[i] for run in runs) for i in (0, 1))
        print(f"{name:<30}{wall:9.2f}{cpu:9.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("module", nargs="?", help="whose imports to show, instead of the times of commands")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=25, help="packages to show")
    words = parser.parse_args()
    if words.module is None:
        show_commands(words.rounds)
    else:
        show_packages(words.module, words.rounds, words.rows)


if __name__ == "__main__":
    main()
