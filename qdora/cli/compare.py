"""Options of `compare`."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from qdora.errors import InputError, require
from qdora.experiments.arms import expand
from qdora.experiments.overlay import base_sections, load_comparison


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--config", required=True, help="YAML file of the comparison")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one key")
    overlay = "settings on top of the comparison's, in a directory of their own; can be repeated"
    parser.add_argument("--overlay", action="append", default=[], metavar="FILE", help=overlay)
    small = "the overlays that the comparison names under `small`: a small model, few steps"
    parser.add_argument("--small", action="store_true", help=small)
    parser.add_argument("--resume", action="store_true", help="continue a comparison in its output.dir")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything that needs no weight, show the plan and the time it takes; writes nothing",
    )


def prepare(arguments: argparse.Namespace) -> Callable[[], None]:
    """Check the configuration of every arm; what is left to do."""
    overlays, small = arguments.overlay, arguments.small
    if not arguments.dry_run:
        require("matplotlib", "compare draws the figures of its report, which")
    config = load_comparison(arguments.config, arguments.set, overlays, small=small)
    base = base_sections(config, arguments.config)
    runs = expand(base, config)
    for run in runs:
        if run.config.data.train.streaming:
            raise InputError(f"{run}: data.train.streaming: arms are compared on a known set; leave it out")

    def work() -> None:
        from qdora.commands.compare import compare

        # Its copy beside the report needs no other file.
        complete = config.model_copy(update={"base": base, "small": ()})
        compare(complete, runs, resume=arguments.resume, dry_run=arguments.dry_run)

    return work
