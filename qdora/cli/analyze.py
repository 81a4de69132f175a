"""Options of `analyze`, a table of subcommands.

A subcommand is an entry of `SUBCOMMANDS` with its options and checks here, its work in
`qdora/commands/analyze.py`, and what it computes in a file of `qdora/analysis/`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from qdora.cli import add_threads
from qdora.config import QuantizationName
from qdora.errors import InputError, suggest
from qdora.output import check_writable
from qdora.run import RunDirectory, Target, resolve_target

FORMATS = tuple(name for name in get_args(QuantizationName) if name != "none")
SPARSITIES = "0,0.1,0.2,0.3,0.4,0.5,0.6,0.7"


@dataclass(frozen=True)
class Subcommand:
    """One analysis.

    Attributes:
        summary: of what it does, for the list.
        add_arguments: gives a parser its options.
        prepare: checks the options; what is left to do.
    """

    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    prepare: Callable[[argparse.Namespace], Callable[[], None]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    subparsers = parser.add_subparsers(dest="analysis", required=True, metavar="SUBCOMMAND")
    for name, subcommand in SUBCOMMANDS.items():
        own = subparsers.add_parser(name, help=subcommand.summary, description=subcommand.summary)
        subcommand.add_arguments(own)
        own.add_argument("--output", metavar="DIR", help="folder to write (default: analysis/ of the run)")
        add_threads(own, default=argparse.SUPPRESS)


def prepare(arguments: argparse.Namespace) -> Callable[[], None]:
    """Check the options of the subcommand; what is left to do."""
    return SUBCOMMANDS[arguments.analysis].prepare(arguments)


def _add_runs(parser: argparse.ArgumentParser) -> None:
    """Options that name one run or several, or a model and an adapter without one."""
    parser.add_argument(
        "--run",
        action="append",
        metavar="DIR",
        help="run directory, repeatable; without it and --model the newest one under runs/",
    )
    parser.add_argument("--model", help="base model, instead of a run's")
    parser.add_argument("--adapter", help="adapter folder in PEFT's format, instead of the run's")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one key")


def _targets(arguments: argparse.Namespace, data: str | None) -> list[Target]:
    """What the options of `_add_runs` name.

    Args:
        data: a data file instead of the runs' own test sets.
    Raises: InputError: as `resolve_target`; a run is given twice, or an option that is about one run.
    """
    runs: Sequence[str | None] = arguments.run or [None]
    if len(runs) > 1 and (arguments.model or arguments.adapter):
        raise InputError("--model and --adapter go with one --run or none; several runs have their own")
    resolved = [Path(run or "").resolve() for run in runs]
    twice = [run for i, run in enumerate(runs) if resolved[i] in resolved[:i]]
    if twice:
        raise InputError(f"--run {twice[0]} is given twice; name different runs")
    return [resolve_target(argparse.Namespace(**{**vars(arguments), "run": run}), data=data) for run in runs]


def _one_base(targets: Sequence[Target]) -> None:
    """Raises: InputError: the runs have different base models."""
    first = targets[0].config.model
    for target in targets[1:]:
        other = target.config.model
        if (other.path, other.revision) != (first.path, first.revision):
            raise InputError(
                f"the runs have different base models, {first.path!r} and {other.path!r}: their layers "
                f"cannot be compared; name runs on one base"
            )


def _names(targets: Sequence[Target]) -> list[str]:
    """A name for each run: its folder's, or its path where two have the same, or that of the base."""
    paths = [t.directory.path if t.directory else Path(t.adapter or t.config.model.path) for t in targets]
    names = [path.name or str(path) for path in paths]
    return names if len({"base", *names}) == len(names) + 1 else [str(path) for path in paths]


def _quantization_arguments(parser: argparse.ArgumentParser) -> None:
    _add_runs(parser)
    parser.add_argument("--data", help="file with questions and answers to measure on, instead of the run's")
    parser.add_argument(
        "--formats", default=",".join(FORMATS), metavar="A,B", help=f"default: {','.join(FORMATS)}"
    )
    parser.add_argument(
        "--examples", type=int, default=8, metavar="N", help="of the test set, to measure on (default: 8)"
    )
    parser.add_argument(
        "--onto",
        default="nf4",
        choices=("nf4", "original"),
        help="merge onto the dequantized weights that the adapter was trained on, whatever their format, or "
        "onto the original ones",
    )


def _prepare_quantization(arguments: argparse.Namespace) -> Callable[[], None]:
    formats = [name.strip() for name in arguments.formats.split(",")]
    for name in formats:
        if name not in FORMATS:
            raise InputError(f"--formats: {name!r}; {suggest(name, FORMATS)}")
    if arguments.examples < 1:
        raise InputError(f"--examples {arguments.examples}; allowed: 1 or more")
    if arguments.model and not arguments.run and not arguments.data and not _sets_test(arguments.set):
        arguments.set.append(f"data.test.count={arguments.examples}")  # of generated problems
    targets = _targets(arguments, arguments.data)
    _one_base(targets)
    output = _output_if_any(arguments, targets[0])

    def work() -> None:
        from qdora.commands.analyze import quantization

        quantization(arguments, targets, _names(targets), list(dict.fromkeys(formats)), output)

    return work


def _sets_test(overrides: Sequence[str]) -> bool:
    return any(override.startswith("data.test") for override in overrides)


def _prune_arguments(parser: argparse.ArgumentParser) -> None:
    _add_runs(parser)
    parser.add_argument("--data", help="file with questions and answers, instead of the run's test set")
    parser.add_argument(
        "--sparsity",
        default=SPARSITIES,
        metavar="A,B",
        help=f"fractions of each layer's weights (default: {SPARSITIES})",
    )
    parser.add_argument("--limit", type=int, help="only the first so many questions")


def _prepare_prune(arguments: argparse.Namespace) -> Callable[[], None]:
    sparsities = sorted({_sparsity(text) for text in arguments.sparsity.split(",")})
    if arguments.model and not arguments.run and not arguments.data and not _sets_test(arguments.set):
        raise InputError("without --run, name a data file with --data")
    if arguments.limit is not None:
        arguments.set.append(f"evaluation.limit={arguments.limit}")
    targets = _targets(arguments, arguments.data)
    output = _output_if_any(arguments, targets[0])

    def work() -> None:
        from qdora.commands.analyze import prune

        prune(targets, _names(targets), sparsities, output)

    return work


def _output_if_any(arguments: argparse.Namespace, target: Target) -> Path | None:
    """The folder that is written; None without a run and --output, where a table on the terminal is all."""
    named = arguments.output or target.directory is not None
    return _output(arguments, target.directory) if named else None


def _sparsity(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise InputError(
            f"--sparsity: {text.strip()!r}; allowed: numbers of at least 0 and below 1, separated by commas"
        )
    return value


def _output(arguments: argparse.Namespace, directory: RunDirectory | None) -> Path:
    """The folder that is written.

    Raises: InputError: it cannot be written, or none is named and there is no run.
    """
    if arguments.output:
        output = Path(arguments.output)
    elif directory is not None:
        output = directory.analysis / arguments.analysis
    else:
        raise InputError("without --run, name a folder to write with --output")
    check_writable(output / "figures.json", f"--output {output}")
    return output


SUBCOMMANDS: Mapping[str, Subcommand] = {
    "quantization": Subcommand(
        "error of each format, layer by layer, of a base and of merged runs",
        _quantization_arguments,
        _prepare_quantization,
    ),
    "prune": Subcommand(
        "exact match of merged runs whose weights are pruned by magnitude",
        _prune_arguments,
        _prepare_prune,
    ),
}
