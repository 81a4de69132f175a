"""Options of `chat`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

from qdora.errors import InputError
from qdora.run import add_target_arguments, resolve_target


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_target_arguments(parser)
    parser.add_argument("--base", action="store_true", help="each answer beside that of the base model")
    parser.add_argument("--system", metavar="TEXT", help="a system turn before all others")
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="longest answer (default: evaluation.max_new_tokens)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0, the default: the most likely token each time; above: drawn, the more evenly the higher",
    )
    parser.add_argument("--top-p", type=float, metavar="P", help="draw among the likeliest with P in all")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw among the K likeliest tokens")
    parser.add_argument("--seed", type=int, help="of the draws (default: other ones each time)")


def prepare(arguments: argparse.Namespace) -> Callable[[], int]:
    """Check the options and find the run; what is left to do."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("chat is one process's; start it without a launcher, as qdora chat")
    _check_sampling(arguments)
    if arguments.max_new_tokens is not None:
        arguments.set.append(f"evaluation.max_new_tokens={arguments.max_new_tokens}")
    target = resolve_target(arguments, data=None)
    if arguments.base and target.adapter is None:
        raise InputError("--base: there is no adapter to leave out; name one with --adapter or --run")

    def work() -> int:
        from qdora.commands.chat import chat

        return chat(arguments, target)

    return work


def _check_sampling(arguments: argparse.Namespace) -> None:
    """Refuse what is no distribution, and settings of draws where nothing is drawn."""
    if not 0 <= arguments.temperature < float("inf"):
        raise InputError(f"--temperature {arguments.temperature}; allowed: 0 or more")
    if arguments.top_p is not None and not 0 < arguments.top_p <= 1:
        raise InputError(f"--top-p {arguments.top_p}; allowed: above 0, up to 1")
    if arguments.top_k is not None and arguments.top_k < 1:
        raise InputError(f"--top-k {arguments.top_k}; allowed: 1 or more")
    if arguments.temperature == 0:
        for name in ("top_p", "top_k", "seed"):
            if getattr(arguments, name) is not None:
                option = "--" + name.replace("_", "-")
                raise InputError(f"{option} is about draws, and --temperature 0 draws nothing")
