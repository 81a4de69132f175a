"""`compare`: arms trained under identical conditions, scored by the same code, in one report."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qdora.commands.train import planned_manifest, read_inputs, train
from qdora.config import RunConfig
from qdora.config_file import config_digest, dump_config, load_config, read_yaml
from qdora.distributed.context import DistributedContext
from qdora.errors import InputError
from qdora.evaluation.evaluate import evaluate_adapter
from qdora.evaluation.scores import Scores, read_scores
from qdora.experiments.arms import ArmRun, CompareConfig, check_conditions, expand, resumed_manifest
from qdora.experiments.report import ArmResult, markdown, write_report
from qdora.files import file_digest, read_json, wrap_os_errors, write_json, write_text
from qdora.run import RunDirectory
from qdora.tasks.prepare import PreparedData
from qdora.training.metrics import read_metrics

CONFIG_COPY = "compare.yaml"
SCORED = "scored.json"
BASE = "base"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--config", required=True, help="YAML file of the comparison")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one key")
    parser.add_argument("--resume", action="store_true", help="continue a comparison in its output.dir")


def run(arguments: argparse.Namespace) -> None:
    """Entry of the command."""
    config = load_config(arguments.config, arguments.set, CompareConfig)
    runs = expand(read_yaml(Path(arguments.config).parent / config.base), config)
    folder = Path(config.output.dir)
    used = (folder / CONFIG_COPY).exists() or any(run.directory.holds_run() for run in runs)
    if used and not (arguments.resume or config.output.overwrite):
        raise InputError(
            f"output.dir {folder} already holds a comparison; continue it with --resume, replace it with "
            f"--set output.overwrite=true, or choose another output.dir"
        )
    context = DistributedContext.from_launch()
    context.refuse_disagreement({str(run): config_digest(run.config) for run in runs})
    planned = _plan(runs, context)
    with context.raise_on_all_ranks():
        if context.is_main:
            _open(folder, config, runs, planned, resume=arguments.resume)
    bases = _score_bases(folder, runs, planned, context)
    results = []
    for run, manifest in zip(runs, planned, strict=True):
        directory = run.directory
        if context.is_main:
            print(f"\n== {run}: {directory.path}", file=sys.stderr)
        if not context.gather([run.is_trained(manifest["steps"])])[0]:
            train(run.config, resume="auto" if arguments.resume else None, context=context)
        inputs = _inputs(run.config, manifest, directory.finished_adapter())
        scores = _score(run.config, inputs, folder, directory.evaluation, context)
        results.append(ArmResult(run, directory.manifest(), read_metrics(directory.metrics_file), scores))
    if context.is_main:
        print(markdown(write_report(folder, results, bases)))
        print(f"report: {folder / 'report.json'}, {folder / 'report.md'}, {folder / 'comparison.png'}")


def _plan(runs: Sequence[ArmRun], context: DistributedContext) -> list[dict[str, Any]]:
    """Check every run as far as that needs no weight; the manifests that they would write.

    Data are read and tokenized once for each tokenizer and data section.
    """
    prepared: dict[tuple[str, str | None, str], PreparedData] = {}
    manifests = []
    for run in runs:
        key = (run.config.model.path, run.config.model.revision, config_digest(run.config.data))
        try:
            if key not in prepared:
                with context.raise_on_all_ranks():
                    prepared[key] = read_inputs(run.config)[2]
            manifests.append(planned_manifest(run.config, prepared[key], context))
        except InputError as error:
            raise InputError(f"{run}: {error}") from error
    return manifests


def _open(
    folder: Path,
    config: CompareConfig,
    runs: Sequence[ArmRun],
    planned: Sequence[Mapping[str, Any]],
    *,
    resume: bool,
) -> None:
    """Refuse runs that cannot be compared, remove those that are replaced, save the configuration."""
    pairs = zip(runs, planned, strict=True)
    check_conditions(runs, [resumed_manifest(*pair) for pair in pairs] if resume else planned)
    with wrap_os_errors(folder):
        if not resume:
            # All at once: --resume must not take a run of the comparison before for one of this comparison.
            (folder / SCORED).unlink(missing_ok=True)
            shutil.rmtree(folder / BASE, ignore_errors=True)
            for run in runs:
                run.directory.clear()
        write_text(folder / CONFIG_COPY, dump_config(config))


def _score_bases(
    folder: Path, runs: Sequence[ArmRun], planned: Sequence[Mapping[str, Any]], context: DistributedContext
) -> dict[str, list[Scores]]:
    """Score each distinct base without its adapters; a name for each, with the arms of one among several."""
    arms: dict[str, list[str]] = {}
    scores = {}
    for run, manifest in zip(runs, planned, strict=True):
        inputs = _inputs(run.config, manifest, None)
        of_base = arms.setdefault(json.dumps(inputs), [])
        if not of_base:
            scores[run.arm] = _score(run.config, inputs, folder, folder / BASE / run.arm, context)
        if run.arm not in of_base:
            of_base.append(run.arm)
    several = len(arms) > 1
    return {f"base of {', '.join(of)}" if several else BASE: scores[of[0]] for of in arms.values()}


def _inputs(config: RunConfig, manifest: Mapping[str, Any], adapter: Path | None) -> dict[str, Any]:
    """What decides the scores of a model."""
    unused = {"every"} if adapter else {"every", "quantization"}
    return {
        "config": config.model_dump(
            mode="json",
            include={"model", "data", "evaluation"},
            exclude={"data": {"train"}, "evaluation": unused},
        ),
        "test": manifest["data"]["fingerprints"]["test"],
        "adapter": adapter and file_digest(adapter / "adapter_model.safetensors"),
    }


def _score(
    config: RunConfig, inputs: Mapping[str, Any], folder: Path, reports: Path, context: DistributedContext
) -> list[Scores]:
    """Score a model, unless its reports are complete, as they were written, and of the same inputs.

    Args:
        inputs: of `_inputs`.
        folder: of the comparison, which records what was scored.
        reports: folder of the reports.
    """
    record = read_json(folder / SCORED) if (folder / SCORED).exists() else {}
    name = str(reports.relative_to(folder))
    if not context.gather([record.get(name) == {"inputs": inputs, "files": _digests(reports)}])[0]:
        adapter = RunDirectory(config.output.dir).adapter if inputs["adapter"] else None
        evaluate_adapter(config, adapter, context, folder=reports)
        with context.raise_on_all_ranks():
            if context.is_main:
                entry = {"inputs": inputs, "files": _digests(reports)}
                write_json(folder / SCORED, record | {name: entry})
    return [read_scores(path) for path in sorted(reports.glob("*.json"))]


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: file_digest(path) for path in sorted(folder.glob("*.json*"))}
