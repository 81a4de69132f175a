"""Options of `benchmark`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qdora.benchmark.gpu.sizes import SIZES, STAGE_NAMES
from qdora.config_file import QUICKSTART, SHIPPED, load_config
from qdora.errors import InputError, suggest
from qdora.output import check_file

TIME_LIMIT = 450
"""Seconds of the stages of `gpu`: with its imports it takes less than eight minutes."""
_OPTIONS: Mapping[str, tuple[tuple[str, ...], Any]] = {
    "rounds": (("layer", "train", "peft", "generate"), None),
    "dtype": (("layer", "train", "peft", "generate"), "float32"),
    "tile_mib": (("layer", "train", "peft", "generate"), None),
    "r": (("layer",), 16),
    "dropout": (("layer",), 0.0),
    "shapes": (("layer",), "all"),
    "config": (("train", "peft", "generate"), None),
    "set": (("train", "peft", "generate"), ()),
    "examples": (("generate",), 128),
    "word_problems": (("generate",), 64),
    "max_new_tokens": (("generate",), 48),
    "batch_sizes": (("generate",), "16,32,64"),
    "time_limit": (("gpu",), TIME_LIMIT),
    "stages": (("gpu",), None),
    "model": (("gpu",), None),
    "size": (("gpu",), None),
}
"""Options that not every measurement has: those that do, and the default."""
_CONFIGS = {"train": QUICKSTART, "peft": QUICKSTART, "generate": f"{SHIPPED}arc-easy-135m"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "what",
        choices=("layer", "train", "peft", "generate", "gpu"),
        help="one layer, a full training step, a step of PEFT's with qdora.accelerate, answers, or all that "
        "there is to measure on a GPU",
    )
    parser.add_argument("--json", metavar="FILE", help="write every figure there as well; gpu: as stages end")
    parser.add_argument(
        "--rounds",
        type=int,
        help="rounds that count (layer: 40 small, 10 large; train, peft: 7; generate: 3)",
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to run")
    dtypes = ("auto", "float32", "bfloat16")
    parser.add_argument("--dtype", choices=dtypes, help="compute dtype of all arms (default: float32)")
    parser.add_argument("--tile-mib", type=float, help="MiB of a tile of W, instead of the device's own")
    parser.add_argument("--r", type=int, help="layer: rank (default: 16)")
    parser.add_argument("--dropout", type=float, help="layer: on the low-rank branch (default: 0)")
    shapes = ("all", "large", "small")
    parser.add_argument("--shapes", choices=shapes, help="layer: LLaMA-7B's, SmolLM2's, or both (default)")
    parser.add_argument(
        "--config",
        help="train, peft, generate: model, adapter and data of this run (default: the quickstart, ARC-Easy)",
    )
    parser.add_argument(
        "--set", action="append", metavar="KEY=VALUE", help="train, peft, generate: override one key"
    )
    parser.add_argument("--examples", type=int, help="generate: questions of its test set (default: 128)")
    parser.add_argument(
        "--word-problems", type=int, help="generate: synthetic ones beside them (default: 64)"
    )
    parser.add_argument("--max-new-tokens", type=int, help="generate: longest answer (default: 48)")
    parser.add_argument("--batch-sizes", metavar="A,B", help="generate: the best counts (default: 16,32,64)")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="gpu: of all stages together")
    stages = ",".join(STAGE_NAMES)
    parser.add_argument("--stages", metavar="A,B", help=f"gpu: some of {stages} (default: all)")
    parser.add_argument("--model", metavar="FILE", help="gpu: the 135M model's GGUF file, for the demo")
    parser.add_argument("--size", choices=tuple(SIZES), help="gpu: full (default on a GPU), or toy")
    parser.add_argument("--go-on", action="store_true", help=argparse.SUPPRESS)


def prepare(arguments: argparse.Namespace) -> Callable[[], int]:
    """Check the options and the configuration; what is left to do."""
    _refuse_foreign_options(arguments)
    _check_numbers(arguments)
    figures = check_file(arguments.json, "--json")
    if arguments.what == "gpu":
        arguments.stages = _stage_names(arguments.stages)
        _check_gpu(arguments)
    arguments.batch_sizes = _batch_sizes(arguments.batch_sizes)
    if arguments.what in _CONFIGS:
        arguments.config = arguments.config or _CONFIGS[arguments.what]
        load_config(arguments.config, arguments.set)  # read again with the dtype that the device decides

    def work() -> int:
        from qdora.commands.benchmark import run

        return run(arguments, figures)

    return work


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


def _check_numbers(arguments: argparse.Namespace) -> None:
    if arguments.r < 1 or not 0 <= arguments.dropout < 1:
        raise InputError(
            f"--r {arguments.r} --dropout {arguments.dropout}; "
            "allowed: r 1 or more, dropout at least 0, below 1"
        )
    if arguments.rounds is not None and arguments.rounds < 1:
        raise InputError(f"--rounds {arguments.rounds}; allowed: 1 or more")
    if arguments.examples < 1 or arguments.word_problems < 0 or arguments.max_new_tokens < 1:
        raise InputError(
            f"--examples {arguments.examples} --word-problems {arguments.word_problems} --max-new-tokens "
            f"{arguments.max_new_tokens}; allowed: examples and tokens 1 or more, problems 0 or more"
        )
    if arguments.tile_mib is not None and arguments.tile_mib <= 0:
        raise InputError(f"--tile-mib {arguments.tile_mib}; allowed: above 0")


def _batch_sizes(asked: str) -> list[int]:
    sizes = [int(size) if size.strip().isdecimal() else 0 for size in asked.split(",")]
    if min(sizes) < 1:
        raise InputError(f"--batch-sizes {asked}; allowed: numbers from 1 on, with commas between them")
    return sizes


def _check_gpu(arguments: argparse.Namespace) -> None:
    if arguments.json is None:
        raise InputError("gpu needs --json FILE: each stage is written there as it ends")
    if not arguments.time_limit > 0:
        raise InputError(f"--time-limit {arguments.time_limit}; allowed: seconds, above 0")
    if arguments.model is not None and not Path(arguments.model).is_file():
        raise InputError(f"--model {arguments.model}: there is no such file; expected the 135M model's GGUF")


def _stage_names(asked: str | None) -> list[str]:
    """The stages that were asked for, in their own order."""
    names = list(STAGE_NAMES) if asked is None else [name.strip() for name in asked.split(",")]
    for name in names:
        if name not in STAGE_NAMES:
            raise InputError(f"--stages {asked}: there is no stage {name!r}; {suggest(name, STAGE_NAMES)}")
    return [name for name in STAGE_NAMES if name in names]
