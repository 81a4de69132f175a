"""Write and read checkpoints from one process, as the tests of single rooms need it."""

from __future__ import annotations

from qdora.distributed.context import DistributedContext
from qdora.training.checkpoint import CheckpointWriter, SavedState, load_checkpoint
from tests.tiny import cpu_context

POSITION = {"seed": 3, "epoch": 1, "batch": 2}


def alone() -> DistributedContext:
    return cpu_context()


def write_checkpoint(
    directory, step, tensors, settings, *, keep=9, save_adapter=lambda path: path.mkdir(), **kind
):
    with CheckpointWriter(directory, settings, alone(), keep=keep, **kind) as checkpoints:
        checkpoints.save(step, tensors, POSITION, save_adapter)
    return directory / f"step-{step}"


def read_checkpoint(folder, like, settings) -> SavedState:
    return load_checkpoint(folder, like, settings, alone())
