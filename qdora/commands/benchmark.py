"""`benchmark`: what our layers and training steps cost next to PEFT's, on this machine."""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from qdora.benchmark.gpu.commands import ROOT
from qdora.benchmark.gpu.goals import goals
from qdora.benchmark.gpu.run import Clock, Record, Setup, run_stages
from qdora.benchmark.gpu.sizes import SIZES
from qdora.benchmark.gpu.stages import STAGES
from qdora.benchmark.layer import ARMS, LARGE, PAIRS, SMALL, benchmark_layer
from qdora.benchmark.peers import describe_machine, gemm_rate, peft_module
from qdora.benchmark.step import benchmark_step
from qdora.commands.train import read_inputs
from qdora.config import AdapterConfig, RunConfig
from qdora.config_file import load_config
from qdora.data.batches import Batch, BatchPlan, collate
from qdora.errors import InputError, suggest
from qdora.files import read_json, write_json
from qdora.models.load import compute_dtype, resolve_device
from qdora.output import check_file
from qdora.quant.base import TILE_BYTES
from qdora.resources import keep_freed_memory

TIME_LIMIT = 450
"""Seconds of the stages of `gpu`: with its imports it takes less than eight minutes."""
GRACE = 15.0
"""Seconds after the time limit in which a stage must come to its end."""
_GO_ON = "--go-on"
_OPTIONS: Mapping[str, tuple[tuple[str, ...], Any]] = {
    "rounds": (("layer", "train"), None),
    "dtype": (("layer", "train"), "float32"),
    "tile_mib": (("layer", "train"), None),
    "r": (("layer",), 16),
    "dropout": (("layer",), 0.0),
    "shapes": (("layer",), "all"),
    "config": (("train",), "configs/quickstart.yaml"),
    "set": (("train",), ()),
    "time_limit": (("gpu",), TIME_LIMIT),
    "stages": (("gpu",), None),
    "model": (("gpu",), None),
    "size": (("gpu",), None),
}
"""Options that not every measurement has: those that do, and the default."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "what",
        choices=("layer", "train", "gpu"),
        help="one layer, a full training step, or all that there is to measure on a GPU",
    )
    parser.add_argument("--json", metavar="FILE", help="write every figure there as well; gpu: as stages end")
    parser.add_argument("--rounds", type=int, help="rounds that count (layer: 40 small, 10 large; train: 7)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to run")
    dtypes = ("auto", "float32", "bfloat16")
    parser.add_argument("--dtype", choices=dtypes, help="compute dtype of all arms (default: float32)")
    parser.add_argument("--tile-mib", type=float, help="MiB of a tile of W, instead of the device's own")
    parser.add_argument("--r", type=int, help="layer: rank (default: 16)")
    parser.add_argument("--dropout", type=float, help="layer: on the low-rank branch (default: 0)")
    shapes = ("all", "large", "small")
    parser.add_argument("--shapes", choices=shapes, help="layer: LLaMA-7B's, SmolLM2's, or both (default)")
    parser.add_argument(
        "--config", help="train: model, adapter and data of this run (default: the quickstart)"
    )
    parser.add_argument("--set", action="append", metavar="KEY=VALUE", help="train: override one key")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="gpu: of all stages together")
    parser.add_argument("--stages", metavar="A,B", help=f"gpu: some of {','.join(STAGES)} (default: all)")
    parser.add_argument("--model", metavar="FILE", help="gpu: the 135M model's GGUF file, for the demo")
    parser.add_argument("--size", choices=tuple(SIZES), help="gpu: full (default on a GPU), or toy")
    parser.add_argument(_GO_ON, action="store_true", help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> int:
    """Entry of the command; 1 where a stage failed."""
    _refuse_foreign_options(arguments)
    peft_module()
    _check(arguments)
    figures = check_file(arguments.json, "--json")
    device = resolve_device(arguments.device)
    if arguments.what == "gpu":
        return _gpu(arguments, device, figures)
    dtype = compute_dtype(arguments.dtype, device)
    keep_freed_memory()  # for PEFT's arms as well
    if arguments.tile_mib is not None:
        TILE_BYTES[device.type] = int(arguments.tile_mib * 2**20)
    machine = describe_machine(device)
    measured = (_layers if arguments.what == "layer" else _train)(arguments, dtype, device)
    print(f"\n{machine['device']}, {machine['threads']} threads, {dtype}")
    if figures is not None:
        write_json(figures, {"machine": machine, "dtype": str(dtype), **measured})
    return 0


def _refuse_foreign_options(arguments: argparse.Namespace) -> None:
    """Give options their defaults; one of another measurement would be ignored.

    Raises: InputError: there is one, with the measurements that have it.
    """
    for name, (of, default) in _OPTIONS.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, default)
        elif arguments.what not in of:
            option = name.replace("_", "-")
            raise InputError(f"benchmark {arguments.what} has no --{option}; only {' and '.join(of)}")


def _check(arguments: argparse.Namespace) -> None:
    if arguments.r < 1 or not 0 <= arguments.dropout < 1:
        raise InputError(
            f"--r {arguments.r} --dropout {arguments.dropout}; "
            "allowed: r 1 or more, dropout at least 0, below 1"
        )
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: there is no CUDA device; allowed: auto, cpu")
    if arguments.rounds is not None and arguments.rounds < 1:
        raise InputError(f"--rounds {arguments.rounds}; allowed: 1 or more")
    if arguments.tile_mib is not None and arguments.tile_mib <= 0:
        raise InputError(f"--tile-mib {arguments.tile_mib}; allowed: above 0")


def _gpu(arguments: argparse.Namespace, device: torch.device, file: Path | None) -> int:
    names = _stage_names(arguments.stages)
    size = arguments.size or ("full" if device.type == "cuda" else "toy")
    if file is None:
        raise InputError("gpu needs --json FILE: each stage is written there as it ends")
    if not arguments.time_limit > 0:
        raise InputError(f"--time-limit {arguments.time_limit}; allowed: seconds, above 0")
    if size == "full" and device.type != "cuda":
        raise InputError("--size full needs a CUDA device; allowed here: toy")
    if arguments.model is not None and not Path(arguments.model).is_file():
        raise InputError(f"--model {arguments.model}: there is no such file; expected the 135M model's GGUF")
    if not (ROOT / "launch" / "train.py").is_file():
        raise InputError("gpu runs the scripts in launch/ and the tests; start it in a source checkout")
    machine = describe_machine(device)
    former = read_json(file)["stages"] if arguments.go_on else []
    done = [record for record in former if record["status"] != "not begun"]

    def write(records: Sequence[Record]) -> None:
        write_json(
            file, {"machine": machine, "size": size, "stages": records, "goals": goals(records, SIZES[size])}
        )

    def restart(left: list[str]) -> None:
        """Go on with the other stages in a new process: this one has lost the device."""
        words = ["gpu", "--json", str(file), "--size", size, "--device", arguments.device, _GO_ON]
        words += ["--stages", ",".join(left), "--time-limit", str(setup.clock.left)]
        words += ["--model", arguments.model] if arguments.model else []
        sys.stdout.flush()
        shutil.rmtree(setup.folder)
        os.execv(sys.executable, [sys.executable, str(ROOT / "launch" / "benchmark.py"), *words])

    # A kernel that never ends cannot be asked to stop: the process ends then, with where it stood.
    faulthandler.dump_traceback_later(arguments.time_limit + GRACE, exit=True, file=2)
    with tempfile.TemporaryDirectory(prefix="qdora-gpu-") as folder:
        model = None if arguments.model is None else Path(arguments.model)
        setup = Setup(device, SIZES[size], Clock(arguments.time_limit), Path(folder), model)
        records = run_stages({name: STAGES[name] for name in names}, setup, write, done, restart)
    faulthandler.cancel_dump_traceback_later()
    print(f"\n{machine['device']}, size {size}: goals on an H100")
    print(tabulate(goals(records, SIZES[size]), headers="keys", floatfmt=".4g", missingval="-"))
    print("\n" + tabulate([(r["stage"], r["status"], r.get("seconds")) for r in records], missingval="-"))
    return int(any(record["status"] == "failed" for record in records))


def _stage_names(asked: str | None) -> list[str]:
    """The stages that were asked for, in their own order."""
    names = list(STAGES) if asked is None else [name.strip() for name in asked.split(",")]
    for name in names:
        if name not in STAGES:
            raise InputError(f"--stages {asked}: there is no stage {name!r}; {suggest(name, STAGES)}")
    return [name for name in STAGES if name in names]


def _layers(arguments: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    config = AdapterConfig(r=arguments.r, alpha=2 * arguments.r, dropout=arguments.dropout, dtype="float32")
    shapes = {"all": (*LARGE, *SMALL), "large": LARGE, "small": SMALL}[arguments.shapes]
    rate = gemm_rate(dtype, device)
    layers, rows = [], []
    for shape in shapes:
        rounds = arguments.rounds or (10 if shape in LARGE else 40)
        layer = benchmark_layer(shape, config, dtype, device, rounds)
        layers.append(layer)
        times = [f"{layer['milliseconds'][arm]:.2f}" for arm in ARMS]
        rows.append([str(shape), *times, *(f"{entry['ratio']:.3f}" for entry in layer["ratios"])])
    titles = [f"{arm} / {peer}" for arm, peer in PAIRS]
    print(tabulate(rows, headers=["shape", *(f"{arm}, ms" for arm in ARMS), *titles]))
    print(f"\nproducts of this machine: {rate / 1e9:.0f} GFLOP/s")
    return {"layers": layers, "machine_flops_per_second": rate}


def _train(arguments: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    config = load_config(
        arguments.config, [*arguments.set, f"model.dtype={str(dtype).removeprefix('torch.')}"]
    )
    step = benchmark_step(config, _first_batch(config), device, arguments.rounds or 7)
    rows = [(name, f"{seconds:.3f}") for name, seconds in step["seconds"].items()]
    print(tabulate(rows, headers=["arm", "seconds a step"]))
    print(f"\nbatch of {step['batch'][0]} x {step['batch'][1]} tokens, {step['labels']} with a loss")
    for entry in step["ratios"]:
        print(f"{entry['arm']} / {entry['peer']}: {entry['ratio']:.3f}")
    gemm = step["gemm"]
    print(
        f"share of the machine's product rate: {100 * gemm['share']:.1f}% of "
        f"{gemm['machine_flops_per_second'] / 1e9:.0f} GFLOP/s "
        f"({gemm['step_flops'] / 1e9:.0f} GFLOP in {gemm['step_seconds']:.3f} s, QDoRA alone)"
    )
    return {"step": step, "config": json.loads(config.model_dump_json())}


def _first_batch(config: RunConfig) -> Batch:
    """The first batch of the run, as training would take it.

    Raises: InputError: a run whose batches PEFT's arms cannot take.
    """
    if config.data.packing != "none":
        raise InputError(
            f"data.packing: got {config.data.packing!r}; PEFT's arms take padded batches, so all do here: "
            f"allowed is none"
        )
    _, _, data = read_inputs(config)
    plan = BatchPlan([len(e.input_ids) for e in data.train], config.training.batch_size, config.training.seed)
    return collate([data.train[i] for i in plan.batch(0)], data.pad_id)
