"""Options of `configs`."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from qdora.config_file import SHIPPED, find_shipped


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("name", nargs="?", help="print the path of this one (default: list all)")


def prepare(arguments: argparse.Namespace) -> Callable[[], None]:
    """Find what is named; what is left to do."""
    name = arguments.name
    found = None if name is None else find_shipped(SHIPPED + name.removeprefix(SHIPPED))

    def work() -> None:
        from qdora.commands.configs import list_shipped

        print(found or list_shipped())

    return work
