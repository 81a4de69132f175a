"""Training checkpoints: verified before use, by all processes alike, whatever their number was.

A checkpoint is `checkpoints/step-N/`: state-R.safetensors (rank R's rows of the float32 parameters and of
both moments), state.json (step, position, settings, SHA-256 of every file) and adapter/ in PEFT's format.
Data order and dropout follow from seed, step and rank, so nothing else is needed to go on.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, cast

import torch
from safetensors import SafetensorError
from torch import distributed as dist
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor

from qdora.distributed.context import DistributedContext
from qdora.distributed.launch import read_timeout
from qdora.errors import CheckpointError, InputError, InterruptedRunError
from qdora.files import (
    clear_leftovers,
    file_digest,
    read_json,
    replace_directory,
    temporary_directory,
    wrap_os_errors,
)
from qdora.training.checkpoint_storage import Reader, load_tensors, save_tensors
from qdora.training.optimizer import local_rows

FACTS = "state.json"
FORMAT = 2

T = TypeVar("T")


@dataclass(frozen=True)
class SavedState:
    """A verified checkpoint.

    Attributes:
        step: optimizer steps done.
        world_size: how many ranks wrote it.
        tensors: the optimizer's state on the CPU; of a sharded tensor the rows of this process.
    """

    step: int
    world_size: int
    tensors: dict[str, torch.Tensor]


def list_checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoint folders, newest first."""
    found = [path for path in directory.glob("step-*") if path.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def load_checkpoint(
    folder: Path, like: Mapping[str, torch.Tensor], settings: Mapping[str, Any], context: DistributedContext
) -> SavedState:
    """Read a checkpoint of any number of processes; every process must call this, and all fare alike.

    Args:
        like: the optimizer's state as it is; its tensors say what is read and stay as they are.
        settings: of this run.
    Raises: CheckpointError: a file is missing, truncated or corrupt, under whichever process.
        InputError: it was written under other settings, or for another model; the first difference is named.
    """
    facts = _read_facts(folder, context)
    _refuse_other_settings(folder, facts["settings"], settings)
    reader = Reader(folder, facts["sha256"])

    def verify() -> Metadata:
        # The processes share the files; each then verifies what it reads and has not verified here.
        for name in sorted(reader.digests)[context.rank :: context.world_size]:
            reader.verify(name)
        return reader.read_metadata()

    _refuse_other_tensors(folder, _alike(folder, context, verify), like)
    return SavedState(facts["step"], facts["processes"], load_tensors(like, reader, context))


def newest_usable(
    directory: Path,
    like: Mapping[str, torch.Tensor],
    settings: Mapping[str, Any],
    context: DistributedContext,
    warn: Callable[[str], None],
) -> SavedState | None:
    """The newest checkpoint that verifies; each unusable one is named to `warn`. None where there is none.

    Every process must call this, and all get the same one.

    Raises: InputError: as `load_checkpoint`, for settings that differ.
    """
    names: list[str] = []
    with context.raise_on_all_ranks():
        if context.is_main:
            clear_leftovers(directory, "step-*")
            names = [path.name for path in list_checkpoints(directory)]
    for name in context.gather([names])[0]:
        try:
            return load_checkpoint(directory / name, like, settings, context)
        except CheckpointError as error:
            warn(f"{error}; trying the one before")
    return None


def _read_facts(folder: Path, context: DistributedContext) -> dict[str, Any]:
    """state.json as the main process reads it."""

    def read() -> dict[str, Any]:
        return _checked_facts(folder) if context.is_main else {}

    facts: dict[str, Any] = context.gather([_alike(folder, context, read)])[0]
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


def _alike(folder: Path, context: DistributedContext, action: Callable[[], T]) -> T:
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
    for rank, words in enumerate(context.gather([problem])):
        if words is not None:
            raise CheckpointError(f"rank {rank}: {words}" if context.world_size > 1 else words)
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


class CheckpointWriter:
    """Writes `directory/step-N`; a context that is left when the last one is in its place.

    An error of one process is an error of all, and leaves nothing behind; older checkpoints stay intact.

    Args:
        directory: of the run's checkpoints.
        settings: what a resumed run must agree on.
        keep: how many, the newest.
        whole: one file with all rows, not one for each process.
        in_background: `save` returns when the tensors are copied. A thread writes them, and its processes
            talk in a group of their own; the next `save` and the end wait for it.
    """

    def __init__(
        self,
        directory: Path,
        settings: Mapping[str, Any],
        context: DistributedContext,
        *,
        keep: int,
        whole: bool = False,
        in_background: bool = False,
    ) -> None:
        self.directory, self.settings, self.context = directory, settings, context
        self.keep, self.whole = keep, whole
        self._thread = ThreadPoolExecutor(1, "checkpoint") if in_background else None
        self._pending: Future[None] | None = None
        self._group: dist.ProcessGroup | None = None
        if in_background and context.world_size > 1:
            self._group = dist.new_group(backend="gloo", timeout=read_timeout(os.environ))

    def save(
        self,
        step: int,
        tensors: Mapping[str, torch.Tensor],
        position: Mapping[str, int],
        save_adapter: Callable[[Path | None], None],
    ) -> None:
        """Write a checkpoint; every process must call this.

        Args:
            step: optimizer steps done.
            tensors: the optimizer's state.
            position: what stands beside the step in the facts, for a reader.
            save_adapter: writes the adapter into the folder that it is given on the main process; on the
                others it is given None, and contributes its shards.
        Raises: InputError: no space left, or the folder cannot be written, here or on another process.
        """
        self.finish()
        folder = self._new_folder(step)
        put = partial(self._put, folder, step, position)
        try:
            with self.context.raise_on_all_ranks():
                save_adapter(folder / "adapter" if self.context.is_main else None)
            contribution = self._contribution(tensors)
            if self._thread is None:
                save_tensors(contribution, None, folder, self.context, None, put)
                return
            copies = {name: local_rows(t).to("cpu", copy=True) for name, t in contribution.items()}
        except BaseException:
            self._remove(folder)
            raise
        self._pending = self._thread.submit(self._write, contribution, copies, folder, put)

    def finish(self) -> None:
        """Wait for the checkpoint that is being written.

        Raises: InputError: it could not be.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After any other error this process may be the only one to end: nobody is waited for.
        if error is None or isinstance(error, InputError | InterruptedRunError):
            self.finish()
            if self._thread is not None:
                self._thread.shutdown()
            if self._group is not None:
                dist.destroy_process_group(self._group)

    def _write(
        self,
        contribution: Mapping[str, torch.Tensor],
        copies: Mapping[str, torch.Tensor],
        folder: Path,
        put: Callable[[dict[str, str]], None],
    ) -> None:
        try:
            save_tensors(contribution, copies, folder, self.context, self._group, put)
        except BaseException:
            self._remove(folder)
            raise

    def _new_folder(self, step: int) -> Path:
        folder = None
        with self.context.raise_on_all_ranks():
            if self.context.is_main:
                clear_leftovers(self.directory, "step-*")
                folder = temporary_directory(self.directory / f"step-{step}")
        return Path(self.context.gather([str(folder)])[0])

    def _contribution(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What this process writes: its shards, and on the main process what all hold alike."""
        main, contribution = self.context.is_main, {}
        for name, tensor in tensors.items():
            if self.whole and isinstance(tensor, DTensor):
                gathered = tensor.full_tensor()
                if main:
                    contribution[name] = gathered.cpu()
            elif main or isinstance(tensor, DTensor):
                contribution[name] = tensor
        return contribution

    def _put(self, folder: Path, step: int, position: Mapping[str, int], digests: dict[str, str]) -> None:
        final = self.directory / f"step-{step}"
        with wrap_os_errors(final):
            for path in (folder / "adapter").rglob("*"):
                if path.is_file():
                    digests[path.relative_to(folder).as_posix()] = file_digest(path)
            facts = {
                "format": FORMAT,
                "step": step,
                **position,
                "processes": self.context.world_size,
                "settings": self.settings,
                "sha256": dict(sorted(digests.items())),
            }
            (folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        replace_directory(folder, final)
        for old in _superfluous(self.directory, step, self.keep):
            shutil.rmtree(old)

    def _remove(self, folder: Path) -> None:
        if self.context.is_main:
            shutil.rmtree(folder, ignore_errors=True)


def _superfluous(directory: Path, step: int, keep: int) -> list[Path]:
    """All but the newest; those of later steps are of a past that this run has gone back behind."""
    found = list_checkpoints(directory)
    return [path for path in found if int(path.name[5:]) > step] + [
        path for path in found if int(path.name[5:]) <= step
    ][keep:]
