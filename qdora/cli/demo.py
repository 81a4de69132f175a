"""Options of `demo`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from qdora.config_file import QUICKSTART, load_config
from qdora.output import check_output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--config", default=QUICKSTART, help="run configuration")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one key")
    parser.add_argument("--export", default="exports/quickstart", help="folder for the merged weights")


def prepare(arguments: argparse.Namespace) -> Callable[[], None]:
    """Check the configuration and the folders; what is left to do."""
    check_output(Path(arguments.export), overwrite=True)
    config = load_config(arguments.config, arguments.set)

    def work() -> None:
        from qdora.commands.demo import demo

        demo(arguments, config)

    return work
