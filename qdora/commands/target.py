"""Which model and adapter a command works on: a run's, or the ones named on the command line."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdora.config import RunConfig
from qdora.config_file import apply_overrides, check_config, set_key
from qdora.errors import InputError
from qdora.run import RunDirectory


@dataclass(frozen=True)
class Target:
    """What to load.

    Attributes:
        config: of the run, or made from the command line.
        adapter: folder in PEFT's format; None for the base alone.
        directory: the run directory; None where there is none.
    """

    config: RunConfig
    adapter: Path | None
    directory: RunDirectory | None


def add_target_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that name a run, or a model and an adapter without one."""
    parser.add_argument("--run", help="run directory")
    parser.add_argument("--model", help="base model, instead of a run's")
    parser.add_argument("--adapter", help="adapter folder in PEFT's format, instead of the run's")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one key")


def resolve_target(arguments: argparse.Namespace, *, data: str | None, base_only: bool = False) -> Target:
    """The run that was named, or a configuration for a model, an adapter and a data file.

    Args:
        data: a data file to score on; None where the command needs none.
        base_only: leave the adapter out.
    Raises: InputError: neither a run nor a model was named, or the run has no adapter.
    """
    if arguments.run:
        directory = RunDirectory(arguments.run)
        tree = directory.config().model_dump(mode="json")
        if arguments.model:
            set_key(tree, "model.path", arguments.model)
    elif arguments.model:
        directory = None
        tree = _without_run(arguments.model)
    else:
        raise InputError("name a run with --run, or a model with --model (and --adapter)")
    if data:
        set_key(tree, "data.test", _data_file(data, tree["data"]["test"]))
    apply_overrides(tree, arguments.set)
    if directory is None and tree["model"].get("base") == "dense":
        tree.setdefault("adapter", {}).setdefault("method", "dora")  # the adapter's own files decide
    config = check_config(tree, RunConfig, arguments.run or "command line")
    adapter = None
    if not base_only:
        if arguments.adapter:
            adapter = Path(arguments.adapter)
        elif directory is not None:
            adapter = directory.finished_adapter()
    return Target(config, adapter, directory)


def _data_file(path: str, test: dict[str, Any]) -> dict[str, Any]:
    """A data file in place of a run's test set, read as that set was where it came from a file too."""
    chosen: dict[str, Any] = {"source": "file", "path": path, "split": "test"}
    if test["source"] in ("file", "hub"):
        chosen |= {key: test[key] for key in ("columns", "answer_kind") if key in test}
    return chosen


def _without_run(model: str) -> dict[str, Any]:
    """A configuration whose training part is never looked at."""
    nothing = {"source": "synthetic", "count": 1}
    return {
        "model": {"path": model},
        "data": {"train": nothing, "test": {**nothing, "split": "test"}},
        "training": {"max_steps": 1},
        "output": {"dir": "runs/unused"},
    }
