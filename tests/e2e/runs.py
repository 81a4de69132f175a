"""Small runs of the real commands: a configuration, data files, and ways to start them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.forked import Forked

ROOT = Path(__file__).parents[2]
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def write_questions(path: Path, count: int, offset: int = 0) -> Path:
    """A jsonl file of sums that a character-level model can at least begin to learn."""
    rows = []
    for i in range(offset, offset + count):
        a, b = i % 17, i % 23
        text = f"{LETTERS[i % 26]}{i}: {a}+{b}?"
        rows.append({"question": text, "answer": f"{a} + {b} = {a + b}. The answer is {a + b}."})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tiny_tree(folder: Path, model: Path, **training: Any) -> dict[str, Any]:
    """The tree of a run configuration whose files all lie in `folder`."""
    train = write_questions(folder / "train.jsonl", 96)
    test = write_questions(folder / "test.jsonl", 8, offset=1000)
    return {
        "model": {"path": str(model), "dtype": "float32"},
        "adapter": {"r": 4, "alpha": 8, "dropout": 0.1},
        "data": {
            "train": {"source": "file", "path": str(train), "name": "sums"},
            "test": {"source": "file", "path": str(test), "name": "sums", "split": "test"},
            "max_length": 128,
        },
        "training": {"max_steps": 10, "batch_size": 8, "learning_rate": 1e-3, "seed": 3} | training,
        "evaluation": {"batch_size": 8, "max_new_tokens": 8},
        "output": {"dir": str(folder / "run")},
    }


def write_config(folder: Path, tree: dict[str, Any], name: str = "config.yaml") -> str:
    path = folder / name
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return str(path)


def write_comparison(folder: Path, model: Path, arms: Sequence[dict[str, Any]], **keys: Any) -> list[str]:
    """A comparison whose files all lie in `folder`; the options that start it."""
    tree = tiny_tree(folder, model, **{"max_steps": 3, "save_every": 1} | keys.pop("training", {}))
    write_config(folder, tree, "base.yaml")
    shared = {"evaluation.limit": 6} | keys.pop("set", {})
    output = {"dir": str(folder / "comparison")}
    comparison = {"base": "base.yaml", "arms": list(arms), "set": shared, "output": output, **keys}
    (folder / "compare.yaml").write_text(yaml.safe_dump(comparison))
    return ["--config", str(folder / "compare.yaml")]


def environment() -> dict[str, str]:
    """Of this process, with this checkout's package before an installed one."""
    ours = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
    return {**os.environ, **ours}


def start(*words: str, launcher: bool = False) -> subprocess.Popen[str] | Forked:
    """Start a script of launch/, directly or through accelerate, which is a process as users start it."""
    prefix = ["-m", "accelerate.commands.launch", "--quiet"] if launcher else []
    if not launcher and words[0].startswith("launch/"):
        return Forked(words, cwd=ROOT, env=environment())
    return subprocess.Popen(
        [sys.executable, *prefix, *words],
        cwd=ROOT,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def finish(process: subprocess.Popen[str] | Forked, code: int = 0, timeout: float = 180) -> str:
    """Wait for the end; its output."""
    output, _ = process.communicate(timeout=timeout)
    assert process.returncode == code, output
    return output


def metrics(run: Path) -> list[dict[str, Any]]:
    """Numbers of a run that do not depend on the clock or the memory."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: json.loads(line)[k] for k in ("step", "loss", "lr", "grad_norm", "tokens")} for line in lines]
