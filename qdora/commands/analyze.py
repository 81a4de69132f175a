"""`analyze`: tables, figures and advice from weights before and after training."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tabulate import tabulate
from tqdm import tqdm

from qdora.adapters.base import describe
from qdora.adapters.inject import inject, linear_layers
from qdora.adapters.patterns import match_layers, matches
from qdora.analysis.curvature import Curvature, curvature, subspace
from qdora.analysis.decomposition import ALL, Change, Fit, changes, fits
from qdora.analysis.ranks import Plan, overlay, overlay_words, overlay_yaml, plan, spectral_gains
from qdora.analysis.spectra import Kind, Spectrum, layer_spectra, summary_rows
from qdora.analysis.trained import TrainedModel, index_of, module_of, saved_steps
from qdora.commands.train import read_inputs
from qdora.config import AdapterConfig, QuantizationName, RunConfig
from qdora.data.batches import collate, divide
from qdora.distributed.context import DistributedContext
from qdora.errors import InputError
from qdora.files import write_csv, write_json, write_text
from qdora.models.load import load_model, resolve_device
from qdora.models.sources import open_checkpoint
from qdora.output import LOCK, locked
from qdora.quant import Quantization
from qdora.run import RunDirectory, Target

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PAPER = {"q_proj": "figure-2-q_proj.png", "v_proj": "figure-7-v_proj.png"}
"""Modules that the paper shows ΔM against ΔD of, and the file of each."""
ATTENTION = ("q_proj", "k_proj", "v_proj")
_SAMPLE_ROWS = 4
"""Examples in a batch of the sample."""


def decomposition(runs: Sequence[tuple[RunDirectory, RunConfig]], output: Path) -> None:
    """ΔM and ΔD of every layer and checkpoint of some runs: tables, lines and the paper's figures.

    Args:
        runs: each with its configuration.
        output: folder to write.
    """
    found: list[Change] = []
    names = _names([directory for directory, _ in runs])
    with ExitStack() as locks:
        for directory, _ in runs:
            name = f"--run {directory.path}"
            locks.enter_context(locked(directory.path / LOCK, name, shared=True))
        model: TrainedModel | None = None
        for name, (directory, config) in zip(names, runs, strict=True):
            if model is None or model.settings != config.model:
                model = TrainedModel(config.model)
            for saved in tqdm(saved_steps(directory), name, unit="checkpoint", leave=False, mininterval=1):
                found += changes(name, _method(config), model, saved)
    lines = fits(found)
    write_csv(output / "changes.csv", [asdict(change) for change in found])
    write_csv(output / "fits.csv", [asdict(line) for line in lines])
    paths = {name: str(directory.path) for name, (directory, _) in zip(names, runs, strict=True)}
    figures = {"runs": paths, "fits": [*map(asdict, lines)], "changes": [*map(asdict, found)]}
    write_json(output / "figures.json", figures)
    _plot_decomposition(found, lines, output)
    print(_fit_table(lines))
    print(f"tables and figures: {output}")


def _plot_decomposition(found: Sequence[Change], lines: Sequence[Fit], output: Path) -> None:
    from qdora.analysis.plots import plot_layers, plot_scatter  # with matplotlib

    modules = list(dict.fromkeys(change.module for change in found))
    for module in modules:
        path = output / PAPER.get(module, f"scatter-{module}.png")
        plot_scatter(found, lines, module, path)
    title = "Magnitude and direction differences after training"
    if "q_proj" in modules:
        plot_layers(found, ["q_proj"], output / "figure-3-q_proj.png", title)
    shown = [module for module in ATTENTION if module in modules]
    if len(shown) > 1:
        plot_layers(found, shown, output / f"figure-8-{'-'.join(shown)}.png", title)
    plot_layers(found, modules, output / "layers.png", title)


def _names(directories: Sequence[RunDirectory]) -> list[str]:
    """The folders' names, or their paths where two are alike."""
    names = [directory.path.resolve().name for directory in directories]
    return names if len(set(names)) == len(names) else [str(directory.path) for directory in directories]


def _method(config: RunConfig) -> str:
    return describe(config.model.quantization, config.adapter, config.training.mode)


def _fit_table(lines: Sequence[Fit]) -> str:
    rows = []
    for line in (line for line in lines if line.step == ALL):
        correlation = _cells(line.correlation, line.correlation_low, line.correlation_high)
        slope = _cells(line.slope, line.slope_low, line.slope_high)
        rows.append((line.run, line.module, line.points, *correlation, *slope))
    headers = ("run", "module", "points", "r", "95% interval", "slope ΔM/ΔD", "95% interval")
    return tabulate(rows, headers=headers, disable_numparse=True)


def _cells(value: float | None, low: float | None, high: float | None) -> tuple[str, str]:
    return ("", "") if value is None else (f"{value:.3g}", f"{low:.3g} to {high:.3g}")


def spectra(target: Target, output: Path) -> None:
    """Singular values and effective ranks: a table, all values, a figure.

    Args:
        target: an adapter, or a model alone.
        output: folder to write.
    """
    found: list[Spectrum] = []
    with target.locked():
        layers = TrainedModel(target.config.model).layers(target.adapter)
        for layer in tqdm(layers, "Spectra", unit="layer", leave=False, mininterval=1):
            found += layer_spectra(layer)
    write_csv(output / "spectra.csv", summary_rows(found))
    write_json(output / "figures.json", {"spectra": [*map(asdict, found)]})
    from qdora.analysis.plots import plot_spectra  # with matplotlib

    plot_spectra(found, output / "spectra.png", f"Spectra, {_title(target)}")
    print(_rank_table(found))
    print(f"table and figure: {output}")


def _title(target: Target) -> str:
    config = target.config
    if target.directory is not None:
        return f"{target.directory.path.resolve().name} ({_method(config)})"
    return f"{config.model.path} ({config.model.quantization})"


def _rank_table(found: Sequence[Spectrum]) -> str:
    rows = []
    for kind, module in dict.fromkeys((spectrum.kind, spectrum.module) for spectrum in found):
        own = [spectrum for spectrum in found if (spectrum.kind, spectrum.module) == (kind, module)]
        effective, stable = ([getattr(s, key) for s in own] for key in ("effective_rank", "stable_rank"))
        largest = [spectrum.values[0] for spectrum in own]
        values = f"{min(len(s.values) for s in own)}"
        rows.append((kind, module, len(own), values, *(_range(v) for v in (largest, effective, stable))))
    headers = ("matrix", "module", "layers", "values", "largest value", "effective rank", "stable rank")
    return tabulate(rows, headers=headers, disable_numparse=True)


def _range(values: Sequence[float]) -> str:
    return f"{np.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def ranks(arguments: argparse.Namespace, target: Target, adapter: AdapterConfig, output: Path) -> None:
    """Ranks under a budget: a configuration overlay, figures, and what a constant rank would take.

    Args:
        arguments: of the command.
        target: what they name.
        adapter: the LoRA that the ranks are for.
        output: folder to write.
    Raises: InputError: the budget is too small.
    """
    curvatures: dict[str, Curvature] = {}
    with target.locked():
        if arguments.by == "hessian":
            shapes, curvatures = _curvatures(arguments, target.config, adapter)
            gains = {name: found.eigenvalues for name, found in curvatures.items()}
            of = "curvature in a low-rank subspace"
        else:
            shapes, found = _ranked_spectra(target, adapter)
            gains = spectral_gains(found, arguments.max_rank)
            of = f"squared singular values: {found[0].kind}"
    chosen = plan(gains, shapes, arguments.budget, adapter.r)
    keys = overlay(chosen, adapter)
    summary = _plan_summary(chosen)
    write_text(output / "ranks.yaml", f"# By {of}, {_title(target)}.\n# {summary}\n{overlay_yaml(keys)}")
    write_text(output / "ranks.args", overlay_words(keys))
    traces = {n: {"trace": c.trace, "trace_error": c.trace_error} for n, c in curvatures.items()}
    layers = [
        {"layer": name, "rank": rank, "parameters": rank * sum(shapes[name]), "gains": gains[name]}
        | traces.get(name, {})
        for name, rank in chosen.ranks.items()
    ]
    totals = {key: value for key, value in asdict(chosen).items() if key != "ranks"}
    write_json(output / "figures.json", {"by": arguments.by, "gains_of": of, **totals, "layers": layers})
    from qdora.analysis.plots import plot_ranks  # with matplotlib

    places = {name: (module_of(name), index_of(name), rank) for name, rank in chosen.ranks.items()}
    plot_ranks(places, chosen.constant, output / "ranks.png", f"Ranks by {arguments.by}, {_title(target)}")
    print(summary)
    if all(rank == len(gains[name]) for name, rank in chosen.ranks.items()):
        print("every layer has all the ranks that there are gains for: a smaller --budget would choose")
    print(f"the value of an arm's set: {output / 'ranks.yaml'}")
    print(f"on a command line: qdora train --config FILE $(cat {output / 'ranks.args'})")


def _plan_summary(chosen: Plan) -> str:
    return (
        f"ranks {min(chosen.ranks.values())} to {max(chosen.ranks.values())}: {chosen.parameters:,} "
        f"parameters of a budget of {chosen.budget:,}, {100 * chosen.gain:.1f}% of all gains; constant rank "
        f"{chosen.constant}: {chosen.constant_parameters:,} parameters, {100 * chosen.constant_gain:.1f}%"
    )


def _ranked_spectra(
    target: Target, adapter: AdapterConfig
) -> tuple[dict[str, tuple[int, int]], list[Spectrum]]:
    """Shape and spectrum of each layer that ranks are for.

    Of an adapter what its low-rank update adds; of full fine-tuning the change; else the base weight.
    """
    model, patterns = TrainedModel(target.config.model), adapter.targets
    if target.adapter is None or target.config.training.mode == "full":
        match_layers([layer.name for layer in model.layers(None)], patterns, "adapter.targets")
    shapes: dict[str, tuple[int, int]] = {}
    found: list[Spectrum] = []
    for layer in tqdm(model.layers(target.adapter), "Spectra", unit="layer", leave=False, mininterval=1):
        dense = target.adapter is None or layer.trained_OI is not None
        targeted = any(matches(layer.name, pattern) for pattern in patterns)
        if not (targeted if dense else layer.layer.update):
            continue
        kind: Kind = "base" if target.adapter is None else "update" if layer.is_rescaled else "change"
        shapes[layer.name] = layer.layer.shape
        found += layer_spectra(layer, [kind])
    if not found:
        raise InputError(f"{target.adapter}: no layer has a low-rank update to choose a rank for")
    return shapes, found


def _curvatures(
    arguments: argparse.Namespace, config: RunConfig, adapter: AdapterConfig
) -> tuple[dict[str, tuple[int, int]], dict[str, Curvature]]:
    """Shape and curvature of each layer that ranks are for, of the base on a sample of the training data."""
    checkpoint, _, data = read_inputs(config)
    context = DistributedContext(device=resolve_device("auto"))

    def adapt(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
        layers = linear_layers(model)
        names = match_layers(layers, adapter.targets, "adapter.targets")
        shapes = {name: (layers[name].out_features, layers[name].in_features) for name in names}
        inject(model, subspace(adapter.targets, shapes, arguments.max_rank), seed=config.training.seed)
        return shapes

    model, shapes = load_model(checkpoint, config.model, context, adapt)
    order = np.random.default_rng(config.training.seed).permutation(len(data.train))
    examples = [data.train[i] for i in order[: arguments.examples]]
    chunks = divide([len(e.input_ids) for e in examples], _SAMPLE_ROWS, balanced=False)
    batches = [collate([examples[i] for i in chunk], data.pad_id).to(context.device) for chunk in chunks]
    total = len(batches) * arguments.probes
    with tqdm(total=total, desc="Curvature", unit="probe", leave=False, mininterval=1) as bar:
        seed = config.training.seed
        return shapes, curvature(model, batches, probes=arguments.probes, seed=seed, done=bar.update)


def quantization(
    arguments: argparse.Namespace,
    targets: Sequence[Target],
    names: Sequence[str],
    formats: Sequence[QuantizationName],
    output: Path | None,
) -> None:
    """Print and write the errors of the base and of each merged run.

    Args:
        arguments: of the subcommand, checked.
        targets: on one base; the first one's test set is measured on.
        names: of them.
        output: folder to write to; None only prints.
    """
    from qdora.analysis import quantization as analysis

    config = targets[0].config
    checkpoint = open_checkpoint(config.model.path, config.model.revision)
    if checkpoint.quantization is not None and arguments.onto == "original":
        raise InputError(
            f"{config.model.path}: holds no original weights, they are stored quantized; use --onto nf4"
        )
    dense = {} if checkpoint.quantization is not None else {"quantization": "none"}
    subjects = [analysis.Subject(analysis.BASE, config.model.model_copy(update=dense), None)]
    for target, name in zip(targets, names, strict=True):
        if target.adapter is not None:
            settings = target.config.model
            if arguments.onto == "original":
                settings = settings.model_copy(update=dense)
            subjects.append(analysis.Subject(name, settings, target.adapter))
    examples = analysis.calibration_examples(config, checkpoint, arguments.examples)
    tokens = sum(len(example.input_ids) for example in examples)
    print(f"{config.model.path}: {len(examples)} examples, {tokens} tokens")
    block_size, double = config.model.block_size, config.model.double_quantization
    rounded = [Quantization(name, block_size, double) for name in formats]
    with ExitStack() as stack:
        for target in targets:
            stack.enter_context(target.locked())
        found = analysis.measure(
            subjects, checkpoint, examples, rounded, DistributedContext(device=resolve_device("auto"))
        )
    print(analysis.table(analysis.medians(found)))
    if output is None:
        return
    settings_of = {
        "examples": len(examples),
        "tokens": tokens,
        "block_size": block_size,
        "double_quantization": double,
        "onto": arguments.onto,
        "models": [analysis.describe_subject(subject) for subject in subjects],
    }
    analysis.write_results(output, found, settings_of)
    print(f"tables and figures: {output}")


def prune(
    targets: Sequence[Target], names: Sequence[str], sparsities: Sequence[float], output: Path | None
) -> None:
    """Print and write each run's exact match at each sparsity.

    Args:
        targets: runs.
        names: of them.
        output: folder to write to; None only prints.
    """
    from qdora.analysis import prune as analysis

    context = DistributedContext(device=resolve_device("auto"))
    found = []
    for target, name in zip(targets, names, strict=True):
        with target.locked():
            found += list(analysis.score_pruned(name, target.config, target.adapter, sparsities, context))
    print(analysis.table(analysis.results(found)))
    if output is None:
        return
    runs = [
        {"name": name, "adapter": t.adapter and str(t.adapter), "model": t.config.model.path}
        for name, t in zip(names, targets, strict=True)
    ]
    analysis.write_results(output, found, {"pruning": "magnitude, per layer, unstructured", "runs": runs})
    print(f"table and figure: {output}")
