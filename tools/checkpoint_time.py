"""How long training waits for a checkpoint, written in the foreground and in the background.

python -m tools.checkpoint_time 60            one process, 60 MB of state
ACCELERATE_USE_FSDP=true FSDP_VERSION=2 ACCELERATE_USE_CPU=true \\
    torchrun --nproc-per-node 2 -m tools.checkpoint_time 30    two ranks, each with 30 MB

The state is that of 672 parameters: A, B and the magnitude of the seven layers of 32 blocks.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch.distributed.tensor import DTensor, Shard

from qdora.distributed.context import DistributedContext
from qdora.files import write_file, write_tensors
from qdora.training.checkpoint import CheckpointWriter

PARAMETERS, SAVES = 672, 5
MOMENTS = ("master", "exp_avg", "exp_avg_sq")


def main() -> None:
    """Measure and print, on each rank of a launch."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("megabytes", type=float, help="of optimizer state on each rank")
    megabytes = parser.parse_args().megabytes
    torch.set_num_threads(1)
    context = DistributedContext.from_launch()
    rows = int(megabytes * 1e6 / (len(MOMENTS) * PARAMETERS * 4 * 16))
    state = make_state(rows, context)
    adapter = torch.zeros(PARAMETERS * rows * 16 * context.world_size, dtype=torch.bfloat16)
    directory = Path(context.gather([tempfile.mkdtemp()])[0])
    for in_background in (False, True):
        waited, written = [], []
        with CheckpointWriter(directory, {}, context, keep=2, in_background=in_background) as checkpoints:
            for step in range(SAVES):
                context.barrier()
                started = time.perf_counter()
                checkpoints.save(step, state, {}, partial(save_adapter, adapter))
                waited.append(time.perf_counter() - started)
                checkpoints.finish()
                written.append(time.perf_counter() - started)
        if context.is_main:
            print(
                f"{context.world_size} ranks, {megabytes:g} MB each, in background: {in_background}; "
                f"training waits {spread(waited)}, written after {spread(written)}"
            )
    if context.is_main:
        shutil.rmtree(directory)
    context.end()


def make_state(rows: int, context: DistributedContext) -> dict[str, torch.Tensor]:
    """Named tensors, each rank with so many rows of 16 numbers."""
    state: dict[str, torch.Tensor] = {}
    for i in range(PARAMETERS):
        state[f"step/{i}"] = torch.zeros(())
        for name in MOMENTS:
            local = torch.randn(rows, 16)
            mesh = context.mesh
            state[f"{name}/{i}"] = local if mesh is None else DTensor.from_local(local, mesh, [Shard(0)])
    return state


def save_adapter(adapter: torch.Tensor, folder: Path | None) -> None:
    if folder is not None:
        write_file(folder / "adapter_model.safetensors", lambda path: write_tensors(path, {"a": adapter}, {}))


def spread(seconds: list[float]) -> str:
    return f"{median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"


if __name__ == "__main__":
    main()
