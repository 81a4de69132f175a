"""Start the ranks of a sharded run by hand, each with its own folder, and see how each ends."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from tests.forked import Forked

ROOT = Path(__file__).parents[2]
SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "ACCELERATE_USE_CPU": "true"}


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def fork_ranks(words: Sequence[Sequence[str]], folders: Sequence[Path], **environment: str) -> list[Forked]:
    """A Python process a rank, with these words, in these folders."""
    shared = {"WORLD_SIZE": str(len(words)), "LOCAL_WORLD_SIZE": str(len(words))}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "QDORA_TIMEOUT": "60"}
    shared |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)} | environment
    return [
        Forked(own, cwd=folder, env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank, (own, folder) in enumerate(zip(words, folders, strict=True))
    ]


def start_ranks(words: Sequence[Sequence[str]], folders: Sequence[Path]) -> list[Forked]:
    """One `python -m qdora.cli` like process a rank of a sharded run, with these words, in these folders."""
    call = "import sys; from qdora.cli import main; main(sys.argv[1:])"
    return fork_ranks([["-c", call, *own] for own in words], folders, **SHARDED)


def ends(processes: Sequence[Forked], within: float = 90) -> list[tuple[int | None, str]]:
    """Exit code and output of each; none may outlast the bound."""
    deadline = time.monotonic() + within
    try:
        outputs = [p.communicate(timeout=max(1, deadline - time.monotonic()))[0] for p in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]
