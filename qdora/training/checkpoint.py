"""Training checkpoints: verified before use, by all processes alike, whatever their number was.

A checkpoint is `checkpoints/step-N/`: state-R.safetensors (rank R's rows of the float32 parameters and of
both moments), state.json (step, position, settings, SHA-256 of every file) and adapter/ in PEFT's format.
Data order and dropout follow from seed, step and rank, so nothing else is needed to go on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from qdora.errors import CheckpointError, InputError
from qdora.files import clear_leftovers, read_json
from qdora.parallel.agreement import together
from qdora.parallel.processes import Processes
from qdora.training.checkpoint_storage import Reader, load_tensors

FACTS = "state.json"
FORMAT = 2

T = TypeVar("T")


@dataclass(frozen=True)
class SavedState:
    """A verified checkpoint.

    Attributes:
        step: optimizer steps done.
        processes: how many wrote it.
        tensors: the optimizer's state on the CPU; of a sharded tensor the rows of this process.
    """

    step: int
    processes: int
    tensors: dict[str, torch.Tensor]


def list_checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoint folders, newest first."""
    found = [path for path in directory.glob("step-*") if path.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def load_checkpoint(
    folder: Path, like: Mapping[str, torch.Tensor], settings: Mapping[str, Any], processes: Processes
) -> SavedState:
    """Read a checkpoint of any number of processes; every process must call this, and all fare alike.

    Args:
        like: the optimizer's state as it is; its tensors say what is read and stay as they are.
        settings: of this run.
    Raises: CheckpointError: a file is missing, truncated or corrupt, under whichever process.
        InputError: it was written under other settings, or for another model; the first difference is named.
    """
    facts = _read_facts(folder, processes)
    _refuse_other_settings(folder, facts["settings"], settings)
    reader = Reader(folder, facts["sha256"])

    def verify() -> Metadata:
        # The processes share the files; each then verifies what it reads and has not verified here.
        for name in sorted(reader.digests)[processes.rank :: processes.count]:
            reader.verify(name)
        return reader.read_metadata()

    _refuse_other_tensors(folder, _alike(folder, processes, verify), like)
    return SavedState(facts["step"], facts["processes"], load_tensors(like, reader, processes))


def newest_usable(
    directory: Path,
    like: Mapping[str, torch.Tensor],
    settings: Mapping[str, Any],
    processes: Processes,
    warn: Callable[[str], None],
) -> SavedState | None:
    """The newest checkpoint that verifies; each unusable one is named to `warn`. None where there is none.

    Every process must call this, and all get the same one.

    Raises: InputError: as `load_checkpoint`, for settings that differ.
    """
    names: list[str] = []
    with together(processes):
        if processes.is_main:
            clear_leftovers(directory, "step-*")
            names = [path.name for path in list_checkpoints(directory)]
    for name in processes.gather([names])[0]:
        try:
            return load_checkpoint(directory / name, like, settings, processes)
        except CheckpointError as error:
            warn(f"{error}; trying the one before")
    return None


def _read_facts(folder: Path, processes: Processes) -> dict[str, Any]:
    """state.json as the main process reads it."""

    def read() -> dict[str, Any]:
        return _checked_facts(folder) if processes.is_main else {}

    facts: dict[str, Any] = processes.gather([_alike(folder, processes, read)])[0]
    return facts


def _checked_facts(folder: Path) -> dict[str, Any]:
    facts = read_json(folder / FACTS)
    if facts.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder}: in format {facts.get('format', 1)!r}; this version of qdora reads format {FORMAT}"
        )
    checked = {
        "step": int(facts["step"]),
        "processes": int(facts["processes"]),
        "settings": dict(facts["settings"]),
        "sha256": {str(name): str(digest) for name, digest in facts["sha256"].items()},
    }
    if folder.name[5:].isdigit() and folder.name != f"step-{checked['step']}":
        raise CheckpointError(f"{folder / FACTS}: corrupt, it says step {checked['step']}")
    return checked


def _alike(folder: Path, processes: Processes, action: Callable[[], T]) -> T:
    """What the action returns here, if it finds the checkpoint in order under every process.

    Raises: CheckpointError: under one of them it does not.
    """
    result, problem = None, None
    try:
        result = action()
    except CheckpointError as error:
        problem = str(error)
    except (InputError, OSError, KeyError, TypeError, ValueError, AttributeError, SafetensorError) as error:
        problem = f"{folder}: not a usable checkpoint: {error}"
    for rank, words in enumerate(processes.gather([problem])):
        if words is not None:
            raise CheckpointError(f"rank {rank}: {words}" if processes.count > 1 else words)
    return cast(T, result)


def _refuse_other_settings(folder: Path, saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    current = json.loads(json.dumps(current))
    for key in sorted(saved.keys() | current.keys()):
        if saved.get(key) != current.get(key):
            raise InputError(
                f"{folder}: written with {key} = {saved.get(key)!r}, this run has {current.get(key)!r}; "
                f"resume with the same settings"
            )


def _refuse_other_tensors(folder: Path, saved: Metadata, like: Mapping[str, torch.Tensor]) -> None:
    sizes = {
        name: tuple(facts.size)
        for name, facts in saved.state_dict_metadata.items()
        if isinstance(facts, TensorStorageMetadata)
    }
    for name in sorted(sizes.keys() | like.keys()):
        there, here = sizes.get(name), tuple(like[name].shape) if name in like else None
        if there != here:
            raise InputError(
                f"{folder}: made for another model: {name} is {_shape(there)} there, {_shape(here)} here"
            )


def _shape(size: tuple[int, ...] | None) -> str:
    return "missing" if size is None else f"of shape {size}"
