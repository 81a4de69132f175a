"""`compare`: arms trained under identical conditions, scored by the same code, in one report."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qdora.commands.train import planned_manifest, read_inputs, train
from qdora.config_file import config_digest, dump_config
from qdora.distributed.context import DistributedContext
from qdora.errors import InputError
from qdora.evaluation.evaluate import evaluate_adapter
from qdora.evaluation.scores import Scores, read_reports
from qdora.experiments.arms import ArmRun, CompareConfig, check_conditions, resumed
from qdora.experiments.pages import markdown
from qdora.experiments.report import write_report
from qdora.files import file_digest, read_json, wrap_os_errors, write_json, write_text
from qdora.run import RunDirectory
from qdora.tasks.prepare import PreparedData
from qdora.tasks.scoring import RULES
from qdora.training.metrics import read_metrics

CONFIG_COPY = "compare.yaml"
SCORED = "scored.json"
BASE = "base"


def compare(config: CompareConfig, runs: Sequence[ArmRun], *, resume: bool) -> None:
    """Train and score every run, and write the report.

    Args:
        runs: of the configuration.
        resume: continue a comparison in its output.dir.
    """
    context = DistributedContext.from_launch()
    context.refuse_disagreement({str(run): config_digest(run.config) for run in runs})
    with context.on_main_rank(RunDirectory(config.output.dir).locked):
        _compare(config, runs, context, resume=resume)
        context.barrier()


def _compare(
    config: CompareConfig, runs: Sequence[ArmRun], context: DistributedContext, *, resume: bool
) -> None:
    folder = Path(config.output.dir)
    with context.raise_on_all_ranks():
        used = (folder / CONFIG_COPY).exists() or any(run.directory.holds_run() for run in runs)
        if used and not (resume or config.output.overwrite):
            raise InputError(
                f"output.dir {folder} already holds a comparison; continue it with --resume, replace it with "
                f"--set output.overwrite=true, or choose another output.dir"
            )
    runs = _planned(runs, context)
    with context.raise_on_all_ranks():
        if context.is_main:
            check_conditions(map(resumed, runs) if resume else runs)
            _open(folder, config, runs, resume=resume)
    bases = _score_bases(folder, runs, context)
    done = []
    for run in runs:
        directory = run.directory
        context.say(f"\n== {run}: {directory.path}")
        if not context.gather([run.is_trained])[0]:
            train(run.config, resume="auto" if resume else None, context=context)
        scores = _score(run, directory.finished_adapter(), folder, directory.evaluation, context)
        steps = read_metrics(directory.metrics_file)
        done.append(replace(run, manifest=directory.manifest(), steps=steps, scores=scores))
    if context.is_main:
        report = write_report(
            folder,
            done,
            bases,
            published=config.published,
            published_source=config.published_source,
        )
        print(markdown(report))
        print(f"report: {folder / 'report.html'}; also report.md, report.json, scores.csv, differences.csv")


def _planned(runs: Sequence[ArmRun], context: DistributedContext) -> list[ArmRun]:
    """Check every run as far as that needs no weight; the runs with the manifests that they would write.

    Data are read and tokenized once for each tokenizer and data section.
    """
    prepared: dict[tuple[str, str | None, str], PreparedData] = {}
    planned = []
    for run in runs:
        key = (run.config.model.path, run.config.model.revision, config_digest(run.config.data))
        try:
            if key not in prepared:
                with context.raise_on_all_ranks():
                    prepared[key] = read_inputs(run.config)[2]
            manifest = planned_manifest(run.config, prepared[key], context)
        except InputError as error:
            raise InputError(f"{run}: {error}") from error
        planned.append(replace(run, manifest=manifest))
    return planned


def _open(folder: Path, config: CompareConfig, runs: Sequence[ArmRun], *, resume: bool) -> None:
    """Save the configuration; without --resume, remove what an earlier comparison left."""
    with wrap_os_errors(folder):
        if not resume:
            # All at once: a later --resume must not take a run of the earlier comparison for one of this one.
            (folder / SCORED).unlink(missing_ok=True)
            shutil.rmtree(folder / BASE, ignore_errors=True)
            for run in runs:
                with run.directory.locked():
                    run.directory.clear()
        write_text(folder / CONFIG_COPY, dump_config(config))


def _score_bases(
    folder: Path, runs: Sequence[ArmRun], context: DistributedContext
) -> dict[str, list[Scores]]:
    """Score each distinct base without its adapters; a name for each, with the arms of one among several."""
    arms: dict[str, list[str]] = {}
    scores = {}
    for run in runs:
        of_base = arms.setdefault(json.dumps(_inputs(run, None)), [])
        if not of_base:
            scores[run.arm] = _score(run, None, folder, folder / BASE / run.arm, context)
        if run.arm not in of_base:
            of_base.append(run.arm)
    several = len(arms) > 1
    return {f"base of {', '.join(of)}" if several else BASE: scores[of[0]] for of in arms.values()}


def _inputs(run: ArmRun, adapter: Path | None) -> dict[str, Any]:
    """What decides the scores of a run's base, or of its adapter."""
    unused = {"data": {"train"}, "evaluation": {"every"} if adapter else {"every", "quantization"}}
    kept = {"model", "data", "evaluation"}
    return {
        "config": run.config.model_dump(mode="json", include=kept, exclude=unused),
        "test": run.manifest["data"]["fingerprints"]["test"],
        "adapter": adapter and file_digest(adapter / "adapter_model.safetensors"),
        "rules": RULES,
    }


def _score(
    run: ArmRun, adapter: Path | None, folder: Path, reports: Path, context: DistributedContext
) -> list[Scores]:
    """Score a run's adapter, or its base, unless the reports are complete and of the same inputs.

    Args:
        adapter: None scores the base.
        folder: of the comparison, which records what was scored.
        reports: folder of the reports.
    """
    inputs, name = _inputs(run, adapter), str(reports.relative_to(folder))
    record = read_json(folder / SCORED) if (folder / SCORED).exists() else {}
    if not context.gather([record.get(name) == {"inputs": inputs, "files": _digests(reports)}])[0]:
        evaluate_adapter(run.config, adapter, context, folder=reports)
        with context.raise_on_all_ranks():
            if context.is_main:
                entry = {"inputs": inputs, "files": _digests(reports)}
                write_json(folder / SCORED, record | {name: entry})
    return read_reports(reports)


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: file_digest(path) for path in sorted(folder.glob("*.json*"))}
