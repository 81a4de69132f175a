"""Write a run's checkpoints: each process its shards, the folder whole or not at all, the newest few kept."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from qdora.errors import InputError, InterruptedRunError
from qdora.files import clear_leftovers, explained, file_digest, put_directory, temporary_directory
from qdora.parallel.agreement import together
from qdora.parallel.join import read_timeout
from qdora.parallel.processes import Processes
from qdora.training.checkpoint import FACTS, FORMAT, list_checkpoints
from qdora.training.checkpoint_storage import save_tensors
from qdora.training.optimizer import local_rows


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
        processes: Processes,
        *,
        keep: int,
        whole: bool = False,
        in_background: bool = False,
    ) -> None:
        self.directory, self.settings, self.processes = directory, settings, processes
        self.keep, self.whole = keep, whole
        self._thread = ThreadPoolExecutor(1, "checkpoint") if in_background else None
        self._pending: Future[None] | None = None
        self._group: dist.ProcessGroup | None = None
        if in_background and processes.count > 1:
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
            with together(self.processes):
                save_adapter(folder / "adapter" if self.processes.is_main else None)
            contribution = self._contribution(tensors)
            if self._thread is None:
                save_tensors(contribution, None, folder, self.processes, None, put)
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
            save_tensors(contribution, copies, folder, self.processes, self._group, put)
        except BaseException:
            self._remove(folder)
            raise

    def _new_folder(self, step: int) -> Path:
        folder = None
        with together(self.processes):
            if self.processes.is_main:
                clear_leftovers(self.directory, "step-*")
                folder = temporary_directory(self.directory / f"step-{step}")
        return Path(self.processes.gather([str(folder)])[0])

    def _contribution(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What this process writes: its shards, and on the main process what all hold alike."""
        main, contribution = self.processes.is_main, {}
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
        with explained(final):
            for path in (folder / "adapter").rglob("*"):
                if path.is_file():
                    digests[path.relative_to(folder).as_posix()] = file_digest(path)
            facts = {
                "format": FORMAT,
                "step": step,
                **position,
                "processes": self.processes.count,
                "settings": self.settings,
                "sha256": dict(sorted(digests.items())),
            }
            (folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        put_directory(folder, final)
        for old in _superfluous(self.directory, step, self.keep):
            shutil.rmtree(old)

    def _remove(self, folder: Path) -> None:
        if self.processes.is_main:
            shutil.rmtree(folder, ignore_errors=True)


def _superfluous(directory: Path, step: int, keep: int) -> list[Path]:
    """All but the newest; those of later steps are of a past that this run has gone back behind."""
    found = list_checkpoints(directory)
    return [path for path in found if int(path.name[5:]) > step] + [
        path for path in found if int(path.name[5:]) <= step
    ][keep:]
