"""Options of `estimate`."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from qdora.config_file import load_config
from qdora.errors import InputError, require
from qdora.output import check_file
from qdora.resources import parse_size

RESERVE = "2GiB"
"""Set aside on a GPU: its context, buffers of NCCL and cuBLAS, what the allocator cannot use."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one key")
    parser.add_argument("--gpus", type=int, help="ranks, one a GPU (default: the launch file's, else 1)")
    parser.add_argument("--gpu-memory", metavar="SIZE", help="of one GPU, 24GiB or 24GB: does the run fit?")
    parser.add_argument(
        "--reserve", default=RESERVE, metavar="SIZE", help=f"set aside on it for CUDA (default: {RESERVE})"
    )
    parser.add_argument(
        "--architecture", metavar="FOLDER", help="with a config.json, instead of the one of model.path"
    )
    parser.add_argument(
        "--accelerate-config",
        metavar="FILE",
        help="how the ranks shard the model (default: FSDP as in configs/accelerate/fsdp.yaml, with one GPU "
        "not at all)",
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), help="whose kernels (default: cuda)")
    parser.add_argument("--scaling", action="store_true", help="also: bytes and times for 2 to 1024 GPUs")
    parser.add_argument("--plot", metavar="PNG", help="with --scaling: efficiency over the number of GPUs")
    parser.add_argument("--json", metavar="FILE", help="write every figure there as well")


def prepare(arguments: argparse.Namespace) -> Callable[[], None]:
    """Check the options and the configuration; what is left to do."""
    memory = None if arguments.gpu_memory is None else parse_size(arguments.gpu_memory, "--gpu-memory")
    reserve = parse_size(arguments.reserve, "--reserve")
    if arguments.plot and not arguments.scaling:
        raise InputError("--plot goes with --scaling")
    if arguments.plot:
        require("matplotlib", "--plot")
    if arguments.gpus is not None and arguments.gpus < 1:
        raise InputError(f"--gpus {arguments.gpus}; allowed: 1 or more")
    plot, figures = check_file(arguments.plot, "--plot"), check_file(arguments.json, "--json")
    config = load_config(arguments.config, arguments.set)

    def work() -> None:
        from qdora.commands.estimate import run

        run(arguments, config, memory, reserve, plot, figures)

    return work
