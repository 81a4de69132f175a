"""`benchmark`: what our layers, training steps and answers cost next to PEFT's, on this machine."""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from qdora.benchmark.generate import Questions, benchmark_generate, table
from qdora.benchmark.gpu.commands import ROOT
from qdora.benchmark.gpu.goals import goals
from qdora.benchmark.gpu.run import Clock, Record, Setup, run_stages
from qdora.benchmark.gpu.sizes import SIZES
from qdora.benchmark.gpu.stages import STAGES
from qdora.benchmark.layer import ARMS, LARGE, PAIRS, SMALL, benchmark_layer
from qdora.benchmark.peers import describe_machine, gemm_rate, peft_module
from qdora.benchmark.peft import benchmark_peft
from qdora.benchmark.step import benchmark_step
from qdora.commands.train import read_inputs
from qdora.config import AdapterConfig, RunConfig
from qdora.config_file import load_config
from qdora.data.batches import Batch, BatchPlan, collate
from qdora.data.tokenize import prompt_ids
from qdora.errors import InputError
from qdora.files import read_json, write_json
from qdora.models.load import compute_dtype, required_tokenizer, resolve_device
from qdora.models.sources import open_checkpoint
from qdora.quant.base import TILE_BYTES
from qdora.resources import keep_freed_memory
from qdora.tasks import synthetic
from qdora.tasks.prepare import for_rows, load_test

GRACE = 15.0
"""Seconds after the time limit in which a stage must come to its end."""


def run(arguments: argparse.Namespace, figures: Path | None) -> int:
    """Measure; 1 where a stage failed.

    Args:
        arguments: of the command, checked.
        figures: JSON file to write.
    Raises: InputError: this machine has not what was asked for.
    """
    peft_module()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: there is no CUDA device; allowed: auto, cpu")
    device = resolve_device(arguments.device)
    if arguments.what == "gpu":
        assert figures is not None, "it was asked for"
        return _gpu(arguments, device, figures)
    dtype = compute_dtype(arguments.dtype, device)
    keep_freed_memory()  # for PEFT's arms as well
    if arguments.tile_mib is not None:
        TILE_BYTES[device.type] = int(arguments.tile_mib * 2**20)
    machine = describe_machine(device)
    measure = {"layer": _layers, "train": _train, "peft": _peft, "generate": _generate}[arguments.what]
    measured = measure(arguments, dtype, device)
    print(f"\n{machine['device']}, {machine['threads']} threads, {dtype}")
    if figures is not None:
        write_json(figures, {"machine": machine, "dtype": str(dtype), **measured})
    return 0


def _gpu(arguments: argparse.Namespace, device: torch.device, file: Path) -> int:
    size = arguments.size or ("full" if device.type == "cuda" else "toy")
    if size == "full" and device.type != "cuda":
        raise InputError("--size full needs a CUDA device; allowed here: toy")
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
        words = ["gpu", "--json", str(file), "--size", size, "--device", arguments.device, "--go-on"]
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
        records = run_stages({name: STAGES[name] for name in arguments.stages}, setup, write, done, restart)
    faulthandler.cancel_dump_traceback_later()
    print(f"\n{machine['device']}, size {size}: goals on an H100")
    print(tabulate(goals(records, SIZES[size]), headers="keys", floatfmt=".4g", missingval="-"))
    print("\n" + tabulate([(r["stage"], r["status"], r.get("seconds")) for r in records], missingval="-"))
    return int(any(record["status"] == "failed" for record in records))


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


def _config(arguments: argparse.Namespace, dtype: torch.dtype) -> RunConfig:
    dtype_name = str(dtype).removeprefix("torch.")
    return load_config(arguments.config, [*arguments.set, f"model.dtype={dtype_name}"])


def _train(arguments: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    config = _config(arguments, dtype)
    step = benchmark_step(config, _first_batch(config), device, arguments.rounds or 7)
    _print_step(step)
    gemm = step["gemm"]
    print(
        f"share of the machine's product rate: {100 * gemm['share']:.1f}% of "
        f"{gemm['machine_flops_per_second'] / 1e9:.0f} GFLOP/s "
        f"({gemm['step_flops'] / 1e9:.0f} GFLOP in {gemm['step_seconds']:.3f} s, QDoRA alone)"
    )
    return {"step": step, "config": json.loads(config.model_dump_json())}


def _peft(arguments: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    config = _config(arguments, dtype)
    step = benchmark_peft(config, _first_batch(config), device, arguments.rounds or 7)
    _print_step(step)
    return {"step": step, "config": json.loads(config.model_dump_json())}


def _print_step(step: dict[str, Any]) -> None:
    rows = [(name, f"{seconds:.3f}") for name, seconds in step["seconds"].items()]
    print(tabulate(rows, headers=["arm", "seconds a step"]))
    print(f"\nbatch of {step['batch'][0]} x {step['batch'][1]} tokens, {step['labels']} with a loss")
    for entry in step["ratios"]:
        print(f"{entry['arm']} / {entry['peer']}: {entry['ratio']:.3f}")


def _generate(arguments: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    config = _config(arguments, dtype)
    checkpoint = open_checkpoint(config.model.path, config.model.revision)
    tokenizer = required_tokenizer(checkpoint, config.data.chat_template)
    own = load_test(config.data, tokenizer).examples[: arguments.examples]
    prompt = for_rows(config.data, own).prompt
    own_ids = prompt_ids(tokenizer, prompt, [example.asked for example in own])
    questions = [Questions(own[0].task, own_ids, arguments.max_new_tokens)]
    if arguments.word_problems:
        problems = synthetic.generate("test", arguments.word_problems, seed=7)
        ids = prompt_ids(tokenizer, "question_answer", [problem.question for problem in problems])
        questions.append(Questions("synthetic", ids, arguments.max_new_tokens))
    with tempfile.TemporaryDirectory(prefix="qdora-generate-") as folder:
        figures = benchmark_generate(
            config, questions, arguments.batch_sizes, device, arguments.rounds or 3, Path(folder)
        )
    print(tabulate(table(figures), headers=["arm", "batch size", "seconds", "examples/s", "tokens/s"]))
    total = sum(figures["questions"].values())
    print(f"\n{total} prompts of {figures['questions']}, {figures['stopped']} answers end before the limit")
    for entry in figures["comparisons"]:
        print(
            f"{entry['arm']} / {entry['peer']}: {entry['times_as_fast']:.2f} times as many examples/s, "
            f"{entry['equal_answers']} of {total} answers equal"
        )
    return {"generate": figures, "config": json.loads(config.model_dump_json())}


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
