"""Options of `export`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import get_args

from qdora.config import QuantizationName
from qdora.errors import InputError
from qdora.run import add_best_argument, add_target_arguments, resolve_target

DTYPES = ("bf16", "fp16")
"""Keys of `qdora.export.write.DTYPES`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_target_arguments(parser)
    add_best_argument(parser)
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--dtype", default="fp16", choices=DTYPES, help="of the written weights")
    parser.add_argument(
        "--onto",
        default="nf4",
        choices=("nf4", "original"),
        help="merge onto the dequantized weights that the adapter was trained on, whatever their format, or "
        "onto the original ones",
    )
    parser.add_argument(
        "--quantize",
        choices=sorted(get_args(QuantizationName)),
        help="full fine-tuning: quantize what was trained to this format, and write what it says",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the output folder")
    parser.add_argument("--no-verify", action="store_true", help="do not load the result to check it")


def prepare(arguments: argparse.Namespace) -> Callable[[], None]:
    """Find the adapter; what is left to do."""
    target = resolve_target(arguments, data=None, best=arguments.best)
    adapter = target.adapter
    if adapter is None:
        raise InputError("name an adapter with --adapter, or a run with --run")

    def work() -> None:
        from qdora.commands.export import export

        export(arguments, target, adapter)

    return work
