"""Options of `train`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

from qdora.config_file import QUICKSTART, load_config
from qdora.tasks import check_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--config", help=f"YAML file of the run (default: {QUICKSTART})")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one key")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="CHECKPOINT",
        help="continue the run in output.dir: its newest usable checkpoint, or the one given",
    )
    parser.add_argument(
        "--ignore-memory",
        action="store_true",
        help="start a run whose worst batch does not fit by the planner's estimate",
    )


def prepare(arguments: argparse.Namespace) -> Callable[[], None]:
    """Check the configuration; what is left to do."""
    if arguments.config is None and os.environ.get("RANK", "0") == "0":
        print(f"no --config given: training the shipped quickstart, {QUICKSTART}", file=sys.stderr)
    config = load_config(arguments.config or QUICKSTART, arguments.set)
    check_run(config)

    def work() -> None:
        from qdora.commands.train import train

        train(config, resume=arguments.resume, check_memory=not arguments.ignore_memory)

    return work
