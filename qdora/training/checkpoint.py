"""Training checkpoints: written atomically, verified before use, resumed on any number of ranks.

A checkpoint is `checkpoints/step-N/`: state-R.safetensors (rank R's shards of the float32 parameters and of
both moments), state.json (metadata: step, position, settings, SHA-256 of every other file), adapter/ and,
where the run keeps it, adapter-best/ in PEFT's format.  Data order and dropout follow from seed, step and
rank, so no generator's state is needed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from torch import distributed as dist

from qdora.distributed.context import DistributedContext
from qdora.errors import CheckpointError, InputError, InterruptedRunError
from qdora.files import (
    clear_leftovers,
    file_digest,
    read_json,
    remove,
    replace_directory,
    temporary_directory,
    wrap_os_errors,
)
from qdora.training.best import ValidationState, copy_best
from qdora.training.checkpoint_storage import ShardReader, Shards, local_shards, write_shards

METADATA = "state.json"
BEST = "adapter-best"
FORMAT = 3
_VALIDATION: TypeAdapter[ValidationState] = TypeAdapter(ValidationState)

T = TypeVar("T")


@dataclass(frozen=True)
class SavedState:
    """A verified checkpoint.

    Attributes:
        folder: of the checkpoint.
        step: optimizer steps done.
        world_size: how many ranks wrote it.
        validation: what came of the validations before it.
        tensors: the optimizer's state on the CPU; of a DTensor this rank's local shard.
    """

    folder: Path
    step: int
    world_size: int
    validation: ValidationState
    tensors: dict[str, torch.Tensor]


def list_checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoint folders, newest first."""
    found = [path for path in directory.glob("step-*") if path.name[5:].isdigit()]
    return sorted(found, key=_step_of, reverse=True)


def load_checkpoint(
    folder: Path, like: Mapping[str, torch.Tensor], settings: Mapping[str, Any], context: DistributedContext
) -> SavedState:
    """Load a checkpoint that any number of ranks wrote; a collective, with the same outcome on all ranks.

    Args:
        like: the optimizer's state as it is; names, shapes and shards of what is read. Left as it is.
        settings: of this run.
    Raises: CheckpointError: a file is missing, truncated or corrupt, on any rank.
        InputError: it was written under other settings, or for another model; the first difference is named.
    """
    metadata = _agree(folder, context, lambda: _read_metadata(folder) if context.is_main else {})
    metadata = context.gather([metadata])[0]
    _refuse_other_settings(folder, metadata["settings"], settings)
    reader = ShardReader(folder, metadata["sha256"])

    def verify() -> dict[str, tuple[int, ...]]:
        # Each rank verifies some of the files; `read` verifies what is left of those that it reads.
        for name in sorted(reader.digests)[context.rank :: context.world_size]:
            reader.verify(name)
        return reader.shapes()

    _refuse_other_shapes(folder, _agree(folder, context, verify), like)
    tensors = _agree(folder, context, lambda: reader.read(like))
    return SavedState(folder, metadata["step"], metadata["processes"], metadata["validation"], tensors)


def newest_usable(
    directory: Path,
    like: Mapping[str, torch.Tensor],
    settings: Mapping[str, Any],
    context: DistributedContext,
    warn: Callable[[str], None],
) -> SavedState | None:
    """Load the newest checkpoint that verifies, the same on all ranks; a collective.

    Args:
        warn: called with a sentence for each newer one that does not verify.
    Returns: None where no checkpoint verifies.
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


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _read_metadata(folder: Path) -> dict[str, Any]:
    metadata = read_json(folder / METADATA)
    found = metadata.get("format", 1)
    if found != FORMAT:
        older = isinstance(found, int) and found < FORMAT
        raise CheckpointError(
            f"{folder}: in format {found!r}; this version of qdora reads format {FORMAT}"
            + (", in which the parameters have other names: " if older else ": ")
            + "continue the run with the version that wrote it, or start anew"
        )
    checked = {
        "step": int(metadata["step"]),
        "processes": int(metadata["processes"]),
        "validation": _VALIDATION.validate_json(json.dumps(metadata.get("validation", {})), strict=True),
        "settings": dict(metadata["settings"]),
        "sha256": {str(name): str(digest) for name, digest in metadata["sha256"].items()},
    }
    if folder.name.removeprefix("step-").isdigit() and _step_of(folder) != checked["step"]:
        raise CheckpointError(f"{folder / METADATA}: corrupt, it says step {checked['step']}")
    return checked


def _agree(folder: Path, context: DistributedContext, action: Callable[[], T]) -> T:
    """Run an action on every rank; return its result if it succeeded on all of them.

    Raises: CheckpointError: on all ranks, where it failed on one.
    """
    result, problem = None, None
    try:
        result = action()
    except CheckpointError as error:
        problem = str(error)
    except (InputError, OSError, KeyError, TypeError, ValueError, AttributeError, SafetensorError) as error:
        problem = f"{folder}: not a usable checkpoint: {error}"
    for rank, text in enumerate(context.gather([problem])):
        if text is not None:
            raise CheckpointError(f"rank {rank}: {text}" if context.world_size > 1 else text)
    return cast(T, result)


def _refuse_other_settings(folder: Path, saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    current = json.loads(json.dumps(current))
    for key in sorted(saved.keys() | current.keys()):
        if saved.get(key) != current.get(key):
            raise InputError(
                f"{folder}: written with {key} = {saved.get(key)!r}, this run has {current.get(key)!r}; "
                f"resume with the same settings"
            )


def _refuse_other_shapes(
    folder: Path, saved: Mapping[str, tuple[int, ...]], like: Mapping[str, torch.Tensor]
) -> None:
    current = {name: tuple(tensor.shape) for name, tensor in like.items()}
    for name in sorted(saved.keys() | current.keys()):
        there, here = (
            f"of shape {shapes[name]}" if name in shapes else "missing" for shapes in (saved, current)
        )
        if there != here:
            raise InputError(f"{folder}: made for another model: {name} is {there} there, {here} here")


class CheckpointWriter:
    """Writes `directory/step-N`; a context manager, whose exit waits for the checkpoint in progress.

    An error on one rank is raised on all and leaves nothing behind; older checkpoints stay intact.

    Args:
        directory: of the run's checkpoints.
        settings: what a resumed run must agree on.
        keep: how many, the newest.
        full_tensors: gather the shards and write one file, not one per rank.
        in_background: `save` returns when the tensors are copied; a thread writes them, with collectives of
            a process group of its own. The next `save` and the end wait for it.
    """

    def __init__(
        self,
        directory: Path,
        settings: Mapping[str, Any],
        context: DistributedContext,
        *,
        keep: int,
        full_tensors: bool = False,
        in_background: bool = False,
    ) -> None:
        self.directory, self.settings, self.context = directory, settings, context
        self.keep, self.full_tensors = keep, full_tensors
        self._thread = ThreadPoolExecutor(1, "checkpoint") if in_background else None
        self._writing = context.with_new_group() if in_background else context
        self._pending: Future[None] | None = None

    def save(
        self,
        step: int,
        tensors: Mapping[str, torch.Tensor],
        position: Mapping[str, int],
        save_adapter: Callable[[Path | None], None],
        validation: ValidationState | None = None,
        best: Path | None = None,
    ) -> None:
        """Write a checkpoint; a collective.

        Args:
            step: optimizer steps done.
            tensors: the optimizer's state.
            position: further metadata of the step.
            save_adapter: writes the adapter into the folder that the main rank passes; the other ranks pass
                None, and contribute their shards.
            validation: what came of the validations so far; None where there are none.
            best: folder of the best adapter, where there is one; it is copied.
        Raises: InputError: no space left, or the folder cannot be written, on any rank.
        """
        self.finish()
        folder = None
        with self.context.raise_on_all_ranks():
            if self.context.is_main:
                clear_leftovers(self.directory, "step-*")
                folder = temporary_directory(self.directory / f"step-{step}")
        folder = Path(self.context.gather([folder])[0])
        metadata = {
            "format": FORMAT,
            "step": step,
            **position,
            "processes": self.context.world_size,
            **({} if validation is None else {"validation": asdict(validation)}),
            "settings": self.settings,
        }
        with self._removed_on_error(folder):
            with self.context.raise_on_all_ranks():
                save_adapter(folder / "adapter" if self.context.is_main else None)
                if self.context.is_main and best is not None:
                    copy_best(best, folder / BEST)
            shards = local_shards(
                tensors, main=self.context.is_main, full=self.full_tensors, copy=self._thread is not None
            )
            if self._thread is None:
                self._write(folder, metadata, shards)
            else:
                self._pending = self._thread.submit(self._write, folder, metadata, shards)

    def finish(self) -> None:
        """Wait for the checkpoint that is being written.

        Raises: InputError: it could not be.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # Any other error may be this rank's alone: a wait for the others could be without end.
        if error is None or isinstance(error, InputError | InterruptedRunError):
            self.finish()
            if self._thread is not None:
                self._thread.shutdown()
            if self._writing.group is not None:
                dist.destroy_process_group(self._writing.group)
        if error is None:
            with self.context.raise_on_all_ranks():
                if self.context.is_main:  # what a run that was killed after its last save did not remove
                    self._remove(list_checkpoints(self.directory)[self.keep :])

    @contextmanager
    def _removed_on_error(self, folder: Path) -> Iterator[None]:
        try:
            yield
        except BaseException:
            if self.context.is_main:
                shutil.rmtree(folder, ignore_errors=True)
            raise

    def _write(self, folder: Path, metadata: dict[str, Any], shards: Shards) -> None:
        """Write the shards of all ranks, then the metadata, and give the folder its final name."""
        context, digests = self._writing, {}
        with self._removed_on_error(folder):
            with context.raise_on_all_ranks():
                digests = write_shards(folder / f"state-{context.rank}.safetensors", shards)
            of_ranks = context.gather([digests])
            with context.raise_on_all_ranks():
                if context.is_main:
                    self._publish(folder, metadata, {k: v for d in of_ranks for k, v in d.items()})

    def _publish(self, folder: Path, metadata: dict[str, Any], digests: dict[str, str]) -> None:
        final = self.directory / f"step-{metadata['step']}"
        with wrap_os_errors(final):
            for path in folder.glob("adapter*/**/*"):
                if path.is_file():
                    digests[path.relative_to(folder).as_posix()] = file_digest(path)
            text = json.dumps(metadata | {"sha256": dict(sorted(digests.items()))}, indent=2)
            (folder / METADATA).write_text(text + "\n", encoding="utf-8")
        replace_directory(folder, final)
        # Later steps were written before this run was resumed from an earlier one.
        found = list_checkpoints(self.directory)
        later = [path for path in found if _step_of(path) > metadata["step"]]
        self._remove(later + found[len(later) :][self.keep :])

    def _remove(self, folders: list[Path]) -> None:
        for folder in folders:
            remove(folder)
