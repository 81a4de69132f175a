"""The command table: `qdora COMMAND`, and what the scripts in launch/ call.

A command is two modules. Here stand its options and what can be refused without a tensor: importing it brings
neither torch nor transformers, so that a typo costs no seconds. `qdora/commands/` does the work, imported
once there is some.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import select
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from qdora.errors import InputError, InterruptedRunError, MissingDataError, suggest
from qdora.resources import choose_threads
from qdora.signals import StopSignal, end, leave, raise_on_signals

COMMANDS = {
    "init": "write a starter configuration that fits",
    "data": "show what a run would be trained on; loads no model",
    "train": "train an adapter as configured",
    "evaluate": "score a run, a model or an adapter by exact match",
    "export": "merge an adapter and write fp16 or bf16 weights",
    "chat": "ask a run, a model or an adapter",
    "compare": "train arms under identical conditions and report",
    "analyze": "what training changed in weights, ranks for layers, fewer bits and entries",
    "estimate": "what a run takes on each GPU, found without one",
    "configs": "the shipped configurations, which --config qdora:NAME takes",
    "schema": "the JSON schema of a configuration file, for editors",
    "benchmark": "what a layer or a training step costs next to PEFT's, and what a GPU does",
    "demo": "train, score and export the shipped quickstart",
}

_COMPUTING = ("train", "evaluate", "export", "chat", "compare", "analyze", "benchmark", "demo")

_LONGEST_SENTENCE = 2000

# Refusals of the operating system that the user can mend; any other OSError is shown in full.
_USERS_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM, errno.EFBIG}
_USERS_ERRORS |= {errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 done, 1 failed in part, 2 bad input, 128 + n stopped by signal n."""
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
    """Run one command and exit with its code."""
    end(run_command(name, arguments))


def run_command(name: str, arguments: Sequence[str]) -> int:
    """Run one command; its exit code."""
    try:
        with raise_on_signals():
            return _run(name, arguments)
    except StopSignal as stop:
        return _ended(name, str(stop), 128 + stop.number)
    except KeyboardInterrupt:
        return _ended(name, "interrupted", 130)


def _run(name: str, arguments: Sequence[str]) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # silences a warning at every fork
    command = importlib.import_module(f"qdora.cli.{name}")
    parser = argparse.ArgumentParser(prog=f"qdora {name}", description=COMMANDS[name])
    command.add_arguments(parser)
    if name in _COMPUTING:
        add_threads(parser)
    parsed = parser.parse_args(arguments)
    try:
        work: Callable[[], int | None] = command.prepare(parsed)
        if name in _COMPUTING:
            _set_up(parsed)
        code = work()
        sys.stdout.flush()
    except MissingDataError as error:
        return _ended(name, f"error: {_missing_data(error, parsed)}", 2)
    except InputError as error:
        return _ended(name, f"error: {error}", 2)
    except InterruptedRunError as stop:
        return _ended(name, str(stop), stop.exit_code)
    except OSError as error:
        if error.errno == errno.EPIPE and _reader_left():
            return 128 + signal.SIGPIPE
        if error.errno not in _USERS_ERRORS:
            raise
        return _ended(name, f"error: {error.filename or 'a file'}: {error.strerror}", 2)
    except Exception as error:
        from qdora.distributed.context import lost_process

        lost = lost_process(error)
        if lost is None:
            raise
        leave(_ended(name, f"error: {lost}", 1))
    return code or 0


def _reader_left() -> bool:
    """Whether nobody reads the output any more, as `head` once it has enough; the rest is dropped then."""
    output = sys.stdout.fileno()
    poll = select.poll()
    poll.register(output, 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return True


def add_threads(parser: argparse.ArgumentParser, default: Any = None) -> None:
    """The option of every command that computes, and of a subcommand, suppressed there by default."""
    help_ = "CPU threads (default: OMP_NUM_THREADS, else as many as there are idle cores)"
    parser.add_argument("--threads", type=int, metavar="N", help=help_, default=default)


def _set_up(parsed: argparse.Namespace) -> None:
    if parsed.threads is not None:
        choose_threads(parsed.threads)
    import torch
    import transformers

    from qdora.distributed.launch import read_flag

    transformers.utils.logging.disable_progress_bar()  # the commands show their own
    cpu = getattr(parsed, "device", None) == "cpu" or read_flag(os.environ, "ACCELERATE_USE_CPU")
    if parsed.threads is None and (cpu or not torch.cuda.is_available()):
        choose_threads(None)


def _missing_data(error: MissingDataError, parsed: argparse.Namespace) -> str:
    """With what the configuration says of its data; without its keys where --data named the file."""
    if getattr(parsed, "data", None):
        return error.what
    if getattr(parsed, "config", None) is None:
        return str(error)
    from qdora.config_file import data_note  # with the configuration's schema, which takes a while

    return f"{error}{data_note(parsed.config)}"


def _ended(name: str, sentence: str, code: int) -> int:
    # What a file holds may stand in the sentence: megabytes, or codes that command a terminal.
    if len(sentence) > _LONGEST_SENTENCE:
        half = _LONGEST_SENTENCE // 2
        sentence = f"{sentence[:half]} [... {len(sentence) - 2 * half} characters ...] {sentence[-half:]}"
    shown = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in sentence)
    print(f"qdora {name}: {shown}", file=sys.stderr)
    return code
