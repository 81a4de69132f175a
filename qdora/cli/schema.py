"""Options of `schema`."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from qdora.experiments.schema import KINDS
from qdora.output import check_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("kind", nargs="?", default="run", choices=list(KINDS), help="of file (default: run)")
    parser.add_argument("--output", metavar="FILE", help="write it there (default: standard output)")


def prepare(arguments: argparse.Namespace) -> Callable[[], None]:
    """Check the output; what is left to do."""
    output = check_file(arguments.output, "--output")

    def work() -> None:
        from qdora.commands.schema import write_schema

        write_schema(arguments.kind, output)

    return work
