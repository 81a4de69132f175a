"""Options of `compare`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from qdora.config_file import load_config, read_yaml
from qdora.experiments.arms import CompareConfig, expand


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--config", required=True, help="YAML file of the comparison")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one key")
    parser.add_argument("--resume", action="store_true", help="continue a comparison in its output.dir")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything that needs no weight, show the plan and the time it takes; writes nothing",
    )


def prepare(arguments: argparse.Namespace) -> Callable[[], None]:
    """Check the configuration of every arm; what is left to do."""
    config = load_config(arguments.config, arguments.set, CompareConfig)
    runs = expand(read_yaml(Path(arguments.config).parent / config.base), config)

    def work() -> None:
        from qdora.commands.compare import compare

        compare(config, runs, resume=arguments.resume, dry_run=arguments.dry_run)

    return work
