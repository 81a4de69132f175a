"""Start the ranks of a sharded run by hand, each with its own folder, and see how each ends."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "ACCELERATE_USE_CPU": "true"}


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def start_ranks(words: Sequence[Sequence[str]], folders: Sequence[Path]) -> list[subprocess.Popen[str]]:
    """One `python -m qdora.cli` like process a rank, with these words, in these folders."""
    port = free_port()
    shared = {"WORLD_SIZE": str(len(words)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "QDORA_TIMEOUT": "60"}
    call = "import sys; from qdora.cli import main; main(sys.argv[1:])"
    return [
        subprocess.Popen(
            [sys.executable, "-c", call, *own],
            cwd=folder,
            env={**os.environ, **shared, **SHARDED, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, (own, folder) in enumerate(zip(words, folders, strict=True))
    ]


def ends(processes: Sequence[subprocess.Popen[str]], within: float = 90) -> list[tuple[int, str]]:
    """Exit code and output of each; none may outlast the bound."""
    deadline = time.monotonic() + within
    try:
        outputs = [p.communicate(timeout=max(1, deadline - time.monotonic()))[0] for p in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]
