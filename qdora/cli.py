"""The command table: `qdora COMMAND`, and what the scripts in launch/ call."""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from qdora.errors import InputError, InterruptedRunError, suggest

COMMANDS = {
    "train": "train an adapter as configured",
    "evaluate": "score a run, a model or an adapter by exact match",
    "export": "merge an adapter and write fp16 or bf16 weights",
    "compare": "train arms under identical conditions and report",
    "estimate": "what a run takes on each GPU, found without one",
    "benchmark": "what a layer or a training step costs next to PEFT's",
    "demo": "the whole way on an embedded example",
}

# Refusals of the operating system that the user can mend; any other OSError is shown in full.
_USERS_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM, errno.EFBIG}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 done, 1 lost another process, 2 bad input, 128 + n stopped by signal n."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print("usage: qdora COMMAND [options]\n")
        for name, summary in COMMANDS.items():
            print(f"  {name:<11}{summary}")
        print("\nqdora COMMAND --help shows a command's options")
        sys.exit(0)
    name, *rest = words
    if name not in COMMANDS:
        print(f"qdora: unknown command {name!r}; {suggest(name, COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    run_and_exit(name, rest)


def run_and_exit(name: str, arguments: Sequence[str]) -> NoReturn:
    """Run one command as all that this process does."""
    code = run_command(name, arguments)
    from qdora.distributed.context import end  # with torch, which the command has loaded

    end(code)


def run_command(name: str, arguments: Sequence[str]) -> int:
    """Run one command; its exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # silences a warning at every fork
    import transformers  # slow, and of no use to --help of the command table

    command = importlib.import_module(f"qdora.commands.{name}")
    parser = argparse.ArgumentParser(prog=f"qdora {name}", description=COMMANDS[name])
    command.add_arguments(parser)
    parsed = parser.parse_args(arguments)
    transformers.utils.logging.disable_progress_bar()  # the commands show their own
    try:
        command.run(parsed)
    except InputError as error:
        print(f"qdora {name}: error: {error}", file=sys.stderr)
        return 2
    except InterruptedRunError as stop:
        print(f"qdora {name}: {stop}", file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        print(f"qdora {name}: interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno not in _USERS_ERRORS:
            raise
        print(f"qdora {name}: error: {error.filename or 'a file'}: {error.strerror}", file=sys.stderr)
        return 2
    except Exception as error:
        from qdora.distributed.context import leave, lost_process

        lost = lost_process(error)
        if lost is None:
            raise
        print(f"qdora {name}: error: {lost}", file=sys.stderr)
        leave(1)
    return 0
