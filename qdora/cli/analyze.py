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
from qdora.config import AdapterConfig, QuantizationName, RunConfig
from qdora.config_file import load_config
from qdora.errors import InputError, require, suggest
from qdora.output import check_writable
from qdora.run import RunDirectory, Target, add_target_arguments, newest_run, resolve_target
from qdora.tasks import check_data

MOST_RANK = 64
EXAMPLES = 32
PROBES = 2
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


def _decomposition_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--run",
        action="append",
        metavar="DIR",
        help="run directory, and again for further runs; the newest one under runs/ where not given",
    )


def _prepare_decomposition(arguments: argparse.Namespace) -> Callable[[], None]:
    directories = [RunDirectory(run) for run in arguments.run or [newest_run().path]]
    resolved = [directory.path.resolve() for directory in directories]
    twice = [str(d.path) for i, d in enumerate(directories) if resolved[i] in resolved[:i]]
    if twice:
        raise InputError(f"--run {twice[0]} is given twice")
    runs = [(directory, directory.config()) for directory in directories]
    output = _output(arguments, directories[0])

    def work() -> None:
        from qdora.commands.analyze import decomposition

        decomposition(runs, output)

    return work


def _spectra_arguments(parser: argparse.ArgumentParser) -> None:
    _add_target(parser)


def _prepare_spectra(arguments: argparse.Namespace) -> Callable[[], None]:
    target = _target(arguments, base_only=False)
    output = _output(arguments, target.directory)

    def work() -> None:
        from qdora.commands.analyze import spectra

        spectra(target, output)

    return work


def _ranks_arguments(parser: argparse.ArgumentParser) -> None:
    _add_target(parser)
    parser.add_argument(
        "--budget",
        type=int,
        metavar="N",
        help="most parameters of A and B of all layers (default: those of adapter.r everywhere)",
    )
    parser.add_argument(
        "--by",
        choices=("spectra", "hessian"),
        default="spectra",
        help="singular values of a run's update, or of the base weights without a run (default); or the "
        "Gauss-Newton matrix of the loss on training examples",
    )
    parser.add_argument(
        "--max-rank", type=int, default=MOST_RANK, metavar="R", help=f"of a layer (default: {MOST_RANK})"
    )
    parser.add_argument(
        "--examples", type=int, metavar="N", help=f"hessian: training examples (default: {EXAMPLES})"
    )
    parser.add_argument(
        "--probes", type=int, metavar="N", help=f"hessian: draws of labels (default: {PROBES})"
    )


def _prepare_ranks(arguments: argparse.Namespace) -> Callable[[], None]:
    _check_numbers(arguments)
    hessian = arguments.by == "hessian"
    target = _target(arguments, base_only=hessian)
    if hessian:
        named = arguments.run or arguments.config or not arguments.model
        if not named and not any(override.startswith("data.train") for override in arguments.set):
            raise InputError(
                "--by hessian takes a sample of training data: name a run with --run, a configuration with "
                "--config, or data with --set data.train=..."
            )
        check_data(target.config.data)
    adapter = _ranked_adapter(target.config)
    output = _output(arguments, target.directory)

    def work() -> None:
        from qdora.commands.analyze import ranks

        ranks(arguments, target, adapter, output)

    return work


def _check_numbers(arguments: argparse.Namespace) -> None:
    """Give options of the Hessian their defaults; refuse what no number may be.

    Raises: InputError: below 1, or an option of the other way.
    """
    for name, default in (("examples", EXAMPLES), ("probes", PROBES)):
        if getattr(arguments, name) is None:
            setattr(arguments, name, default)
        elif arguments.by != "hessian":
            raise InputError(f"--{name} goes with --by hessian")
    for name in ("budget", "max_rank", "examples", "probes"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} {value}; allowed: 1 or more")


def _ranked_adapter(config: RunConfig) -> AdapterConfig:
    """The LoRA that ranks are chosen for: the configured one, the default one after full fine-tuning.

    Raises: InputError: an update that has one rank for all layers, or only even ranks.
    """
    if config.training.mode == "full":
        return AdapterConfig()
    if config.adapter.type != "lora":
        raise InputError(
            f"adapter.type {config.adapter.type!r} has one rank for all layers; ranks are chosen for: lora"
        )
    if config.adapter.init == "orthogonal":
        raise InputError(
            "adapter.init 'orthogonal' takes even ranks only, those chosen may be odd; set another"
        )
    return config.adapter


def _add_target(parser: argparse.ArgumentParser) -> None:
    add_target_arguments(parser)
    parser.add_argument("--config", metavar="FILE", help="YAML file of a run that need not have been trained")


def _target(arguments: argparse.Namespace, *, base_only: bool) -> Target:
    """The run, the model or the configuration that is named.

    Raises: InputError: as `resolve_target`, or a configuration beside another name.
    """
    if not arguments.config:
        return resolve_target(arguments, data=None, base_only=base_only)
    if arguments.run or arguments.model:
        raise InputError("--config goes with neither --run nor --model: name one of them")
    adapter = Path(arguments.adapter) if arguments.adapter and not base_only else None
    return Target(load_config(arguments.config, arguments.set), adapter, None)


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

    Raises: InputError: it cannot be written, none is named and there is no run, or matplotlib is missing.
    """
    require("matplotlib", f"analyze {arguments.analysis} draws a figure, which")
    if arguments.output:
        output = Path(arguments.output)
    elif directory is not None:
        output = directory.analysis / arguments.analysis
    else:
        raise InputError("without --run, name a folder to write with --output")
    check_writable(output / "figures.json", f"--output {output}")
    return output


SUBCOMMANDS: Mapping[str, Subcommand] = {
    "decomposition": Subcommand(
        "how much magnitude and direction of each weight changed in training (DoRA, Figures 2, 3, 7, 8)",
        _decomposition_arguments,
        _prepare_decomposition,
    ),
    "spectra": Subcommand(
        "singular values and effective ranks of base weights and of what training changed",
        _spectra_arguments,
        _prepare_spectra,
    ),
    "ranks": Subcommand(
        "a rank for each layer under a budget of parameters", _ranks_arguments, _prepare_ranks
    ),
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
