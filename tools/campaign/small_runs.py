"""Small runs of the commands, and what must be the same of a run that was hurt and one that was not."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qdora.files import file_digest
from tests.e2e.runs import metrics, tiny_tree, write_config
from tests.tiny import write_tiny_model

STEPS = 12
_OF_THE_CLOCK = ("seconds", "tokens_per_second")
# Whose contents have times, or the folder.
_PRESENT = (
    "README.md",
    "manifest.json",
    "config.yaml",
    "loss.png",
    "report.html",
    "report.json",
    "report.md",
    "compare.yaml",
    "comparison.png",
)


@dataclass(frozen=True)
class Inputs:
    """Files of all runs, in one folder.

    Attributes:
        model: a tiny LLaMA.
        config: of a training run.
        compare: of a comparison of two arms.
    """

    model: Path
    config: Path
    compare: Path


def write_inputs(folder: Path) -> Inputs:
    """Write the model, the data and the configurations."""
    folder.mkdir(parents=True, exist_ok=True)
    model = write_tiny_model(folder / "model")
    tree = tiny_tree(folder, model, max_steps=STEPS, save_every=2, keep_checkpoints=2)
    tree["evaluation"] |= {"every": 6, "limit": 2, "max_new_tokens": 4}
    config = write_config(folder, tree)
    comparison = {
        "base": "config.yaml",
        "arms": [{"name": "qdora"}, {"name": "qlora", "set": {"adapter.dora": False}}],
        "seeds": [1],
        "set": {"training.max_steps": 4, "evaluation.every": None},
        "output": {"dir": str(folder / "comparison")},
    }
    (folder / "compare.yaml").write_text(yaml.safe_dump(comparison))
    return Inputs(model, Path(config), folder / "compare.yaml")


def snapshot(folder: Path) -> dict[str, Any]:
    """What a run has left, by path: contents that do not depend on the clock, or that the file is there."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir():
            if not any(path.iterdir()):
                found[f"{name}/"] = "empty"
        elif path.name in _PRESENT:
            found[name] = "present"
        elif path.name == "metrics.jsonl":
            found[name] = metrics(path.parent)
        elif path.name == "sums.json":
            tree = json.loads(path.read_text())
            found[name] = {key: value for key, value in tree.items() if key not in _OF_THE_CLOCK}
        elif path.name == "scored.json":
            found[name] = {key: value["inputs"] for key, value in json.loads(path.read_text()).items()}
        else:
            found[name] = file_digest(path)
    return found


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """One line for each path in which two snapshots differ."""
    lines = [f"{name} is left over" for name in found.keys() - expected.keys()]
    lines += [f"{name} is missing" for name in expected.keys() - found.keys()]
    lines += [f"{name} differs" for name in found.keys() & expected.keys() if found[name] != expected[name]]
    return sorted(lines)


def damaged_checkpoints(run: Path) -> list[str]:
    """One line for each file of a published checkpoint that is not what its metadata says."""
    lines = []
    for folder in run.rglob("step-*"):
        if folder.parent.name != "checkpoints":
            continue
        try:
            digests = json.loads((folder / "state.json").read_text())["sha256"]
            bad = [name for name, digest in digests.items() if file_digest(folder / name) != digest]
        except (OSError, ValueError, KeyError) as error:
            bad = [str(error)]
        lines += [f"{folder.name} is published and damaged: {what}" for what in bad]
    return lines


def newest_step(run: Path) -> int:
    """The newest published checkpoint; one that is being replaced counts. 0 where there is none."""
    names = os.listdir(run / "checkpoints") if (run / "checkpoints").is_dir() else []  # noqa: PTH208
    names = [name[1:].split(".")[0] if name.endswith(".replaced") else name for name in names]
    return max((int(name[5:]) for name in names if name[5:].isdigit()), default=0)
