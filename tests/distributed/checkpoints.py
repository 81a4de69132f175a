"""Save and load checkpoints of hand-made shards on several processes; each writes what it saw.

RANK=... WORLD_SIZE=... python -m tests.distributed.checkpoints OUT PART
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from qdora.config import TrainingConfig
from qdora.distributed.context import DistributedContext, lost_process
from qdora.files import file_digest
from qdora.signals import end, leave
from qdora.training import checkpoint_storage
from qdora.training.checkpoint import CheckpointWriter, load_checkpoint, newest_usable
from qdora.training.optimizer import AdapterOptimizer, local_shard

SETTINGS = {"rate": 1e-3, "targets": ("q_proj", "v_proj")}
POSITION = {"seed": 3, "epoch": 0, "batch": 4}
ROWS = {"five": (5, 3), "three": (3,), "eight": (8, 2), "one": (1, 7)}
"""Two and four ranks hold uneven shards; of some, the last ranks have none."""


def full_parameters() -> dict[str, torch.Tensor]:
    """What is trained, in full."""
    generator = torch.Generator().manual_seed(5)
    return {name: torch.randn(shape, generator=generator) for name, shape in ROWS.items()}


def make_optimizer(
    context: DistributedContext | None = None, dtype: torch.dtype = torch.float32
) -> AdapterOptimizer:
    """Full parameters on one rank, shards on several."""
    parameters = {name: nn.Parameter(_shard(t, context).to(dtype)) for name, t in full_parameters().items()}
    for parameter in parameters.values():
        if dtype != torch.float32:
            parameter.grad_dtype = torch.float32
    config = TrainingConfig(max_steps=9, learning_rate=1e-2, weight_decay=0.1)
    return AdapterOptimizer(parameters, config)


def train(optimizer: AdapterOptimizer, steps: range, context: DistributedContext | None = None) -> None:
    """Steps with gradients that follow from step and name."""
    for step in steps:
        for name, parameter in optimizer.parameters.items():
            generator = torch.Generator().manual_seed(100 * step + len(name))
            parameter.grad = _shard(torch.randn(ROWS[name], generator=generator), context)
        optimizer.step(1e-2 / (1 + step))


def no_adapter(folder: Path | None) -> None:
    if folder is not None:
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_bytes(b"weights")


def caught(function: Callable[..., Any], *arguments: Any) -> list[str]:
    try:
        function(*arguments)
    except Exception as error:
        return [type(error).__name__, str(error)]
    return []


def main(out: Path, part: str) -> None:
    torch.set_num_threads(1)
    context = DistributedContext.from_launch()
    facts = PARTS[part](out, context)
    (out / f"{part}-{context.rank}.json").write_text(json.dumps(facts))
    context.barrier()
    context.end()


def two(out: Path, context: DistributedContext) -> dict[str, Any]:
    """From the start: train, save in every way, fail in every way."""
    facts: dict[str, Any] = {}
    optimizer = make_optimizer(context)
    facts["rows"] = {name: len(local_shard(p)) for name, p in optimizer.parameters.items()}
    train(optimizer, range(3), context)
    save_full(optimizer, out / "two.safetensors", context)
    writer = CheckpointWriter(out / "run", SETTINGS, context, keep=2)
    with writer:
        writer.save(3, optimizer.state(), POSITION, no_adapter)
    with CheckpointWriter(out / "full", SETTINGS, context, keep=2, full_tensors=True) as full:
        full.save(3, optimizer.state(), POSITION, no_adapter)
    with CheckpointWriter(out / "background", SETTINGS, context, keep=2, in_background=True) as background:
        background.save(3, optimizer.state(), POSITION, no_adapter)
        train(optimizer, range(3, 4), context)
        save_full(optimizer, out / "background.safetensors", context)
        background.save(4, optimizer.state(), POSITION, no_adapter)
        train(optimizer, range(4, 5), context)
    replicated = {"master/x": torch.arange(6.0), "step/x": torch.tensor(1.0)}
    with CheckpointWriter(out / "replicated", SETTINGS, context, keep=2) as replicas:
        replicas.save(3, replicated, POSITION, no_adapter)
    for name in ("run", "background"):
        facts[f"written {name}"] = sorted(
            str(p.relative_to(out / name)) for p in (out / name).rglob("*") if p.is_file()
        )

    context.barrier()
    with Replaced("write_tensors", refuse, on=context.rank == 1):
        facts["disk"] = caught(writer.save, 5, optimizer.state(), POSITION, no_adapter)
        with CheckpointWriter(out / "run", SETTINGS, context, keep=2, in_background=True) as background:
            background.save(6, optimizer.state(), POSITION, no_adapter)
            facts["disk in background"] = caught(background.finish)
    failing = no_such_adapter if context.is_main else no_adapter
    facts["adapter"] = caught(writer.save, 7, optimizer.state(), POSITION, failing)
    context.barrier()
    facts["left"] = sorted(p.name for p in (out / "run").iterdir())
    context.barrier()

    writer.save(5, optimizer.state(), POSITION, no_adapter)
    like = make_optimizer(context).state()
    said: list[str] = []
    # A disk that only one process finds bad, then a file that is.
    with Replaced("file_digest", lambda path: "0" * 64, on=context.rank == 1):
        facts["one rank"] = caught(load_checkpoint, out / "run" / "step-5", like, SETTINGS, context)
    # Its own copy of the file that it reads; the main process has verified another one.
    with Replaced("file_digest", bad_own_file, on=context.rank == 1):
        facts["own copy"] = caught(load_checkpoint, out / "run" / "step-5", like, SETTINGS, context)
    if context.is_main:
        file = out / "run" / "step-5" / "state-1.safetensors"
        data = file.read_bytes()
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    context.barrier()
    found = newest_usable(out / "run", like, SETTINGS, context, said.append)
    assert found is not None
    facts["found"], facts["said"] = found.step, said
    facts["settings"] = caught(newest_usable, out / "run", like, {"rate": 2}, context, said.append)
    return facts


def going_on(out: Path, context: DistributedContext) -> dict[str, Any]:
    """From one process's checkpoint: as many steps as needed, and a checkpoint."""
    optimizer = make_optimizer(context)
    versions = {name: p._version for name, p in optimizer.parameters.items()}
    found = newest_usable(out / "run", optimizer.state(), SETTINGS, context, print)
    assert found is not None
    optimizer.load_state(found.tensors)
    facts = {
        "step": found.step,
        "processes": found.world_size,
        "noticed": all(p._version > versions[name] for name, p in optimizer.parameters.items()),
        "rows": {name: len(local_shard(p)) for name, p in optimizer.parameters.items()},
    }
    save_full(optimizer, out / "four loaded.safetensors", context)
    train(optimizer, range(found.step, found.step + 2), context)
    save_full(optimizer, out / "four.safetensors", context)
    with CheckpointWriter(out / "run", SETTINGS, context, keep=9) as writer:
        writer.save(found.step + 2, optimizer.state(), POSITION, no_adapter)
    return facts


def killed(out: Path, context: DistributedContext) -> dict[str, Any]:
    """One process is killed in the middle of its file; the others must end, and say why."""
    optimizer = make_optimizer(context)
    train(optimizer, range(1), context)
    in_background = os.environ["IN_BACKGROUND"] == "yes"
    started = time.monotonic()
    try:
        with CheckpointWriter(
            out / "killed", SETTINGS, context, keep=9, in_background=in_background
        ) as writer:
            writer.save(1, optimizer.state(), POSITION, no_adapter)
            writer.finish()
            with Replaced("write_tensors", die, on=context.rank == int(os.environ["DIES"])):
                writer.save(2, optimizer.state(), POSITION, no_adapter)
                for _ in range(1000):  # the next steps
                    context.barrier()
                    time.sleep(0.01)
    except Exception as error:
        lost = lost_process(error)
        seconds = time.monotonic() - started
        (out / f"survivor-{context.rank}.json").write_text(json.dumps({"lost": lost, "seconds": seconds}))
        leave(1)
    return {}


def save_full(optimizer: AdapterOptimizer, file: Path, context: DistributedContext) -> None:
    """Write the full tensors of the state, without a checkpoint's code."""
    state = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in optimizer.state().items()}
    if context.is_main:
        save_file({name: tensor.clone() for name, tensor in state.items()}, file)


class Replaced:
    """A function of the storage replaced on one process while entered."""

    def __init__(self, name: str, function: Callable[..., Any], on: bool) -> None:
        self.name, self.function, self.on = name, function, on

    def __enter__(self) -> None:
        self.old = getattr(checkpoint_storage, self.name)
        if self.on:
            setattr(checkpoint_storage, self.name, self.function)

    def __exit__(self, *_: object) -> None:
        setattr(checkpoint_storage, self.name, self.old)


def refuse(path: Path, *_: Any) -> None:
    path.write_bytes(b"half")
    raise OSError(28, "No space left on device")


def die(path: Path, *_: Any) -> None:
    path.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)


def bad_own_file(path: Path) -> str:
    return "0" * 64 if path.name == "state-1.safetensors" else file_digest(path)


def no_such_adapter(folder: Path | None) -> None:
    raise RuntimeError("no adapter")


def _shard(tensor: torch.Tensor, context: DistributedContext | None) -> torch.Tensor:
    if context is None or context.mesh is None:
        return tensor
    return distribute_tensor(tensor, context.mesh, [Shard(0)])


PARTS: dict[str, Callable[[Path, DistributedContext], dict[str, Any]]] = {
    "two": two,
    "four": going_on,
    "killed": killed,
}

if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
    end(0)
