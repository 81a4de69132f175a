"""Runs on disk: the files of a run directory, its manifest, and the choice of what a command works on."""

from __future__ import annotations

import argparse
import calendar
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdora.config import PromptName, RunConfig
from qdora.config_file import apply_overrides, check_config, dump_config, load_config
from qdora.errors import InputError
from qdora.files import (
    clear_leftovers,
    read_json,
    remove,
    write_json,
    write_text,
)
from qdora.output import LOCK, locked

_VERSIONED = ("torch", "bitsandbytes", "transformers", "accelerate", "datasets", "safetensors", "qdora")
_TIME_FORMAT = "%Y-%m-%dT%H:%M:%SZ"


class RunDirectory:
    """Paths inside a run directory, and the files that describe the run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.manifest_file = self.path / "manifest.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.loss_plot = self.path / "loss.png"
        self.adapter = self.path / "adapter"
        self.best_adapter = self.path / "adapter-best"
        self.checkpoints = self.path / "checkpoints"
        self.evaluation = self.path / "evaluation"
        self.base_evaluation = self.path / "evaluation-base"
        self.validation = self.path / "evaluation-validation"
        self.base_validation = self.path / "evaluation-base-validation"
        self.best_evaluation = self.path / "evaluation-best"
        self.best_validation = self.path / "evaluation-best-validation"
        self.analysis = self.path / "analysis"

    def holds_run(self) -> bool:
        """Whether a run has been started here."""
        return self.config_file.exists() or self.metrics_file.exists() or self.checkpoints.exists()

    def locked(self) -> AbstractContextManager[None]:
        """Keep other processes from writing this run, or from using its adapter while it is written.

        Raises: InputError: another process does; the folder cannot be written.
        """
        return locked(self.path / LOCK, f"output.dir {self.path}")

    def refuse_if_used(self, overwrite: bool) -> None:
        """Refuse to write over a run unless `overwrite`.

        Raises: InputError: there is one.
        """
        if self.holds_run() and not overwrite:
            raise InputError(
                f"output.dir {self.path} already holds a run; continue it with --resume, replace it "
                f"with --set output.overwrite=true, or choose another output.dir"
            )

    def clear(self) -> None:
        """Remove a run's files and no others.

        Raises: InputError: one cannot be removed.
        """
        for path in self._written():
            remove(path)

    def clear_leftovers(self) -> None:
        """Remove what a process left that was killed while it removed a run.

        Raises: InputError: it cannot be removed.
        """
        for path in self._written():
            clear_leftovers(self.path, path.name)

    def _written(self) -> tuple[Path, ...]:
        """Everything of a run. A kill while it is removed in this order leaves what `--resume` takes."""
        scores = (self.evaluation, self.base_evaluation, self.validation, self.base_validation)
        of_best = (self.best_adapter, self.best_evaluation, self.best_validation)
        results = (self.adapter, *of_best, *scores, self.analysis, self.loss_plot)
        return (*results, self.checkpoints, self.metrics_file, self.manifest_file, self.config_file)

    def start(self, config: RunConfig, manifest: dict[str, Any]) -> None:
        """Write the resolved configuration and the manifest."""
        write_json(self.manifest_file, manifest)
        write_text(self.config_file, dump_config(config))

    def record_resume(self, config: RunConfig, step: int) -> None:
        """Add to the manifest that the run was resumed after `step`; write the configuration now in force.

        Raises: InputError: the manifest is missing or not JSON.
        """
        manifest = self.manifest()
        manifest.pop("stopped_early", None)
        resumed = [*manifest.get("resumed", []), {"step": step, "started": _now(), "command": _command()}]
        self.start(config, manifest | {"resumed": resumed})

    def record(self, **fields: Any) -> None:
        """Put fields that are known while a run trains into its manifest, one that is None out of it.

        Raises: InputError: the manifest is missing or not JSON.
        """
        manifest = {key: value for key, value in self.manifest().items() if key not in fields}
        known = {key: value for key, value in fields.items() if value is not None}
        write_json(self.manifest_file, manifest | known)

    def config(self) -> RunConfig:
        """The configuration in force.

        Raises: InputError: there is no run here.
        """
        if not self.config_file.is_file():
            raise InputError(f"{self.path}: not a run directory, it has no config.yaml")
        return load_config(self.config_file)

    def manifest(self) -> dict[str, Any]:
        """What `start` wrote.

        Raises: InputError: missing or not JSON.
        """
        return read_json(self.manifest_file)

    def start_time(self) -> tuple[float, float]:
        """When the run was started, and when its configuration was written, in seconds since the epoch.

        Without a usable manifest both are the second.
        """
        written = self.config_file.stat().st_mtime
        try:
            return calendar.timegm(time.strptime(self.manifest()["started"], _TIME_FORMAT)), written
        except (KeyError, TypeError, ValueError):
            return written, written

    def finished_adapter(self) -> Path:
        """Folder of the trained adapter.

        Raises: InputError: the run has none; its newest checkpoint is named where there is one.
        """
        if _holds_adapter(self.adapter):
            return self.adapter
        found = [path for path in self.checkpoints.glob("step-*") if path.name[5:].isdigit()]
        newest = max(found, key=lambda path: int(path.name[5:]), default=None)
        hint = f"; its newest checkpoint is {newest}" if newest else ""
        raise InputError(f"{self.path}: the run has no adapter, it was not finished{hint}")

    def kept_adapter(self) -> Path:
        """Folder of the best adapter.

        Raises: InputError: the run has none.
        """
        if not _holds_adapter(self.best_adapter):
            raise InputError(
                f"--best: {self.path} has no adapter-best; a run keeps it with training.keep_best: loss or "
                f"exact_match"
            )
        return self.best_adapter


def _holds_adapter(folder: Path) -> bool:
    return (folder / "adapter_model.safetensors").is_file()


def newest_run(root: str | Path = "runs") -> RunDirectory:
    """The run below `root` that was started last, finished or not.

    Raises: InputError: there is none.
    """
    found = [RunDirectory(path.parent) for path in Path(root).rglob("config.yaml")]
    if not found:
        raise InputError(
            f"there is no run under {root}/; name a run with --run, or a model with --model (and --adapter)"
        )
    return max(found, key=RunDirectory.start_time)


def make_manifest(config: RunConfig, *, world_size: int, fields: dict[str, Any]) -> dict[str, Any]:
    """Everything that a reader needs to repeat a run, or to see why theirs differs.

    Args:
        config: its seeds are repeated here.
        fields: fingerprints and counts of base and data.
    """
    return {
        "started": _now(),
        "command": _command(),
        "versions": {"python": platform.python_version(), **package_versions()},
        "git_commit": git_commit(),
        "machine": machine(),
        "processes": world_size,
        "seeds": {"training": config.training.seed, "data": config.data.train.seed},
        **fields,
    }


def package_versions(*others: str) -> dict[str, str]:
    """Installed versions of the packages that decide numbers, and of others.

    `not installed` of a package that is on the path without its metadata, as this one in a checkout may be.
    """
    return {name: _version(name) for name in (*_VERSIONED, *others)}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def git_commit() -> str | None:
    """Commit of the source tree, with `+changes` where it differs; None outside a checkout.

    An installed package may lie inside a repository of somebody else's.
    """
    if not (Path(__file__).parents[1] / ".git").exists():
        return None
    try:
        return _git("rev-parse", "HEAD") + ("+changes" if _git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def machine() -> dict[str, Any]:
    """Processor, cores in use and accelerators."""
    import torch

    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _now() -> str:
    return time.strftime(_TIME_FORMAT, time.gmtime())


def _command() -> str:
    return shlex.join(sys.argv)


def _git(*arguments: str) -> str:
    folder = Path(__file__).parent
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@dataclass(frozen=True)
class Target:
    """What a command works on.

    Attributes:
        config: of the run, or made from the command line.
        adapter: folder in PEFT's format; None for the base alone.
        directory: the run directory; None where there is none.
    """

    config: RunConfig
    adapter: Path | None
    directory: RunDirectory | None

    def locked(self) -> AbstractContextManager[None]:
        """Keep other processes from training the run whose adapter is used; others may use it too.

        Raises: InputError: another process trains it.
        """
        run = self.directory
        if run is None or self.adapter not in (run.adapter, run.best_adapter):
            return nullcontext()
        return locked(run.path / LOCK, f"--run {run.path}", shared=True)


def add_target_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that name a run, or a model and an adapter without one."""
    parser.add_argument("--run", help="run directory; without it and --model the newest one under runs/")
    parser.add_argument("--model", help="base model, instead of a run's")
    parser.add_argument("--adapter", help="adapter folder in PEFT's format, instead of the run's")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one key")


def add_best_argument(parser: argparse.ArgumentParser) -> None:
    """The option that names the best adapter of a run, beside those of `add_target_arguments`."""
    parser.add_argument(
        "--best",
        action="store_true",
        help="the run's adapter-best, of its best validation (training.keep_best)",
    )


def resolve_target(
    arguments: argparse.Namespace, *, data: str | None, base_only: bool = False, best: bool = False
) -> Target:
    """The named run, else the named model with an adapter and a data file, else the newest run.

    Args:
        data: a data file to score on; None where the command needs none.
        base_only: leave the adapter out.
        best: the run's best adapter instead of its last one.
    Raises: InputError: there is no run, or it has no adapter, or an override is wrong.
    """
    directory = RunDirectory(arguments.run) if arguments.run else None
    if best:
        others = {"--adapter": arguments.adapter, "--base-only": base_only}
        others |= {"--model without --run": arguments.model and not arguments.run}
        for option in (name for name, given in others.items() if given):
            raise InputError(f"--best is an adapter of a run; it does not go with {option}")
    if directory is None and not arguments.model:
        directory = newest_run()
        if os.environ.get("RANK", "0") == "0":
            print(f"no --run given: {directory.path} is the newest run", file=sys.stderr)
    tree = _without_run() if directory is None else directory.config().model_dump(mode="json")
    if arguments.model:
        tree["model"]["path"] = arguments.model
    if data:
        tree["data"]["test"] = _data_file(data, tree["data"].get("test"))
    apply_overrides(tree, arguments.set)
    config = check_config(tree, RunConfig, str(directory.path) if directory else "command line")
    adapter = None
    if arguments.adapter and not base_only:
        adapter = Path(arguments.adapter)
    elif directory is not None and not base_only:
        adapter = directory.kept_adapter() if best else directory.finished_adapter()
    return Target(config, adapter, directory)


def prompt_name(arguments: argparse.Namespace, config: RunConfig, has_template: bool) -> PromptName:
    """The prompt that a model answers: a run's; without one that of `--set data.prompt`, else a chat's turns.

    Args:
        has_template: the tokenizer has a chat template.
    """
    named = not arguments.model or arguments.run or any(s.startswith("data.prompt=") for s in arguments.set)
    return config.data.prompt if named or not has_template else "chat"


def _data_file(path: str, test: dict[str, Any] | None) -> dict[str, Any]:
    """A data file in place of a run's test set, with that set's columns where it came from a file too."""
    chosen: dict[str, Any] = {"source": "file", "path": path, "split": "test"}
    if test is not None and test["source"] in ("file", "hub"):
        chosen |= {key: test[key] for key in ("columns", "answer_kind", "format") if key in test}
    return chosen


def _without_run() -> dict[str, Any]:
    """A configuration whose training part is not used, before the model is named."""
    nothing = {"source": "synthetic", "count": 1}
    return {
        "model": {},
        "data": {"train": nothing, "test": {**nothing, "split": "test"}},
        "training": {"max_steps": 1},
        "output": {"dir": "runs/unused"},
    }
