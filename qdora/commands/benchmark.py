"""`benchmark`: what our layers and training steps cost next to PEFT's, on this machine."""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from tabulate import tabulate

from qdora.benchmark.layer import ARMS, LARGE, PAIRS, SMALL, benchmark_layer
from qdora.benchmark.peers import describe_machine, gemm_rate, peft_module
from qdora.benchmark.step import benchmark_step
from qdora.commands.train import read_inputs
from qdora.config import AdapterConfig, RunConfig
from qdora.config_file import load_config
from qdora.data.batches import Batch, BatchPlan, collate
from qdora.errors import InputError
from qdora.files import write_json
from qdora.models.load import compute_dtype, resolve_device
from qdora.output import check_file
from qdora.quant.base import TILE_BYTES
from qdora.resources import keep_freed_memory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("what", choices=("layer", "train"), help="one layer, or a full training step")
    parser.add_argument("--json", metavar="FILE", help="write every figure there as well")
    parser.add_argument("--rounds", type=int, help="rounds that count (layer: 40 small, 10 large; train: 7)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to run")
    dtypes = ("auto", "float32", "bfloat16")
    parser.add_argument("--dtype", default="float32", choices=dtypes, help="compute dtype of all arms")
    parser.add_argument("--tile-mib", type=float, help="MiB of a tile of W, instead of the device's own")
    parser.add_argument("--r", type=int, default=16, help="layer: rank")
    parser.add_argument("--dropout", type=float, default=0.0, help="layer: on the low-rank branch")
    shapes = ("all", "large", "small")
    parser.add_argument(
        "--shapes", default="all", choices=shapes, help="layer: LLaMA-7B's, SmolLM2's, or both"
    )
    parser.add_argument(
        "--config", default="configs/quickstart.yaml", help="train: model, adapter and data of this run"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one key")


def run(arguments: argparse.Namespace) -> None:
    """Entry of the command."""
    peft_module()
    _check(arguments)
    figures = check_file(arguments.json, "--json")
    device = resolve_device(arguments.device)
    dtype = compute_dtype(arguments.dtype, device)
    keep_freed_memory()  # for PEFT's arms as well
    if arguments.tile_mib is not None:
        TILE_BYTES[device.type] = int(arguments.tile_mib * 2**20)
    machine = describe_machine(device)
    measured = (_layers if arguments.what == "layer" else _train)(arguments, dtype, device)
    print(f"\n{machine['device']}, {machine['threads']} threads, {dtype}")
    if figures is not None:
        write_json(figures, {"machine": machine, "dtype": str(dtype), **measured})


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
    """The first batch of the run, as training would take it."""
    _, _, data = read_inputs(config)
    plan = BatchPlan([len(e.input_ids) for e in data.train], config.training.batch_size, config.training.seed)
    return collate([data.train[i] for i in plan.batch(0)], data.pad_id)
