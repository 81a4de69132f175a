"""Options of `data`."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from qdora.config_file import load_config
from qdora.errors import InputError
from qdora.tasks import check_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one key")
    parser.add_argument(
        "--show", type=int, default=3, metavar="N", help="training examples shown as tokens (default: 3)"
    )
    parser.add_argument(
        "--stats", action="store_true", help="also: lengths as a histogram, repeated rows, each reason"
    )


def prepare(arguments: argparse.Namespace) -> Callable[[], int]:
    """Check the configuration; what is left to do."""
    if arguments.show < 0:
        raise InputError(f"--show {arguments.show}; allowed: 0 or more")
    config = load_config(arguments.config, arguments.set)
    check_run(config)

    def work() -> int:
        from qdora.commands.data import show_data

        return show_data(config, arguments.show, stats=arguments.stats)

    return work
