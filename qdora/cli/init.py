"""Options of `init`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from qdora.cli.estimate import RESERVE
from qdora.errors import InputError
from qdora.output import check_writable
from qdora.resources import parse_size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--model", required=True, help="hub id, folder, GGUF file or packaged model")
    parser.add_argument(
        "--data", required=True, help="json, jsonl, csv or parquet file, or a folder of one kind"
    )
    parser.add_argument(
        "--gpu-memory", metavar="SIZE", help="of one GPU, 24GiB or 24GB (default: that of this machine)"
    )
    parser.add_argument(
        "--reserve", default=RESERVE, metavar="SIZE", help=f"set aside on it for CUDA (default: {RESERVE})"
    )
    parser.add_argument(
        "--output", metavar="FILE", help="configuration to write (default: DATA's name, .yaml)"
    )
    parser.add_argument(
        "--architecture", metavar="FOLDER", help="with a config.json, where --model cannot be had here"
    )


def prepare(arguments: argparse.Namespace) -> Callable[[], None]:
    """Check the options and the places; what is left to do."""
    memory = None if arguments.gpu_memory is None else parse_size(arguments.gpu_memory, "--gpu-memory")
    reserve = parse_size(arguments.reserve, "--reserve")
    data = Path(arguments.data)
    output = Path(arguments.output) if arguments.output else Path(f"{data.name.partition('.')[0]}.yaml")
    if output.exists():
        raise InputError(f"{output}: already exists; name another file with --output")
    check_writable(output, f"--output {output}")

    def work() -> None:
        from qdora.commands.init import init

        init(arguments, output, memory, reserve)

    return work
