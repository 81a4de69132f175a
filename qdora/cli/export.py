"""Options of `export`."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from qdora.errors import InputError
from qdora.export import add_format_arguments, check_format
from qdora.run import add_best_argument, add_target_arguments, resolve_target


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_target_arguments(parser)
    add_best_argument(parser)
    parser.add_argument("--output", required=True, help="folder to write")
    add_format_arguments(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace the output folder")
    parser.add_argument("--no-verify", action="store_true", help="do not load the result to check it")
    parser.add_argument("--device", default="auto", metavar="DEVICE", help="auto, cpu, cuda or cuda:N")


def prepare(arguments: argparse.Namespace) -> Callable[[], None]:
    """Check the format's options and find the adapter; what is left to do."""
    check_format(arguments)
    target = resolve_target(arguments, data=None, best=arguments.best)
    adapter = target.adapter
    if adapter is None:
        raise InputError("name an adapter with --adapter, or a run with --run")

    def work() -> None:
        from qdora.commands.export import export

        export(arguments, target, adapter)

    return work
