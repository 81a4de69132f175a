"""`compare`: arms trained under identical conditions, scored by the same code, in one report."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qdora.adapters.fingerprint import base_fingerprint
from qdora.commands.train import plan_run, read_inputs, train
from qdora.config import RunConfig
from qdora.config_file import config_digest, dump_config
from qdora.distributed.context import DistributedContext
from qdora.errors import InputError, MissingDataError
from qdora.evaluation.evaluate import evaluate_adapter
from qdora.evaluation.scores import Scores, read_reports
from qdora.experiments.arms import UNTRAINED, ArmRun, CompareConfig, check_conditions, resumed
from qdora.experiments.grid import GridPoint, choose, point_name
from qdora.experiments.pages import markdown
from qdora.experiments.plan import Item, Progress, dry_run_page, plan_items, training_settings
from qdora.experiments.report import write_report
from qdora.export.card import renew_run_cards, write_run_cards
from qdora.files import atomic_directory, file_digest, read_json, wrap_os_errors, write_json, write_text
from qdora.models.load import build_adapted, compute_dtype
from qdora.models.provenance import CARD_FILE
from qdora.models.sources import open_checkpoint
from qdora.run import RunDirectory, make_manifest
from qdora.tasks.prepare import PreparedData, Split, rendered
from qdora.tasks.scoring import RULES
from qdora.training.metrics import read_metrics

CONFIG_COPY = "compare.yaml"
SCORED = "scored.json"


def compare(config: CompareConfig, runs: Sequence[ArmRun], *, resume: bool, dry_run: bool = False) -> None:
    """Train and score every run, and write the report.

    Args:
        runs: of `expand`.
        resume: continue a comparison in its output.dir.
        dry_run: check everything that needs no weight, print the plan, and write nothing.
    """
    context = DistributedContext.from_launch()
    context.refuse_disagreement({str(run): config_digest(run.config) for run in runs})
    comparison = _Comparison(config, runs, context, resume=resume)
    if dry_run:
        page = comparison.dry_run()
        if context.is_main:
            print(page)
        return
    with context.on_main_rank(RunDirectory(config.output.dir).locked):
        comparison.run()
        context.barrier()


class _Comparison:
    """A comparison in its folder; its methods are collectives.

    Attributes:
        planned: the runs whose point of the grid is known, with the manifests that they would write, by name.
    """

    def __init__(
        self, config: CompareConfig, runs: Sequence[ArmRun], context: DistributedContext, *, resume: bool
    ) -> None:
        self.config, self.runs, self.context, self.resume = config, runs, context, resume
        self.folder = Path(config.output.dir)
        self.items = plan_items(runs)
        self.progress = Progress(self.items, context.say)
        self.planned: dict[str, ArmRun] = {}
        self._prepared: dict[tuple[str, str | None, str], PreparedData] = {}

    def dry_run(self) -> str:
        """The plan, after all checks that `run` makes before it writes."""
        self._check_before_choice()
        chosen = self._chosen_before() if self.resume else {}
        self._plan([run for run in self.runs if run.point and run.point == chosen.get(run.arm)])
        self._check_conditions()
        of_point = {(run.arm, point_name(run.point)): run.manifest for run in self.planned.values()}
        # Another seed changes neither the steps nor the parameters of a point.
        runs = [
            self.planned.get(str(run)) or replace(run, manifest=of_point[run.arm, point_name(run.point)])
            for run in self.runs
        ]
        return dry_run_page(self.config, runs, chosen, resume=self.resume)

    def run(self) -> None:
        """Train and score what is missing, and write the report."""
        self._check_before_choice()
        with self.context.raise_on_all_ranks():
            if self.context.is_main:
                self._open()
        untrained = {item.arm: self._score_untrained(item) for item in self.items if not item.runs[0].train}
        grid = self._run_grids()
        chosen = {point.arm: point.settings for point in grid if point.chosen}
        runs = [run for run in self.runs if run.point == chosen.get(run.arm, {})]
        self._plan(runs)
        self._check_conditions()
        runs = [self.planned[str(run)] for run in runs]
        bases = self._score_bases(runs)
        finals = {(item.arm, item.seed): item for item in self.items if not item.on_validation}
        done = []
        for run in runs:
            scores = untrained.get(run.arm) or self._train_and_score(finals[run.arm, run.seed], run)
            if run.train:
                run = replace(
                    run, manifest=run.directory.manifest(), steps=read_metrics(run.directory.metrics_file)
                )
            done.append(replace(run, scores=scores))
        if self.context.is_main:
            report = write_report(
                self.folder,
                done,
                bases,
                grid,
                published=self.config.published,
                published_source=self.config.published_source,
            )
            page = self.folder / "report.html"
            print(markdown(report))
            print(f"report: {page}; also report.md, report.json and tables, *.csv")

    def _check_before_choice(self) -> None:
        """Check all that needs no weight and no choice of a grid's point.

        Raises: InputError: a run cannot be trained or compared, or the folder holds another comparison.
        """
        with self.context.raise_on_all_ranks():
            used = (self.folder / CONFIG_COPY).exists() or any(run.directory.holds_run() for run in self.runs)
            if used and not (self.resume or self.config.output.overwrite):
                raise InputError(
                    f"output.dir {self.folder} already holds a comparison; continue it with --resume, "
                    f"replace it with --set output.overwrite=true, or choose another output.dir"
                )
        first = self.runs[0].seed
        self._plan([run for run in self.runs if run.seed == first or not run.point])
        self._check_conditions()

    def _plan(self, runs: Sequence[ArmRun]) -> None:
        """Check runs as far as that needs no weight, and find the manifests that they would write.

        Data are read and tokenized once for each tokenizer and data section.
        """
        for run in (run for run in runs if str(run) not in self.planned):
            model, data = run.config.model, run.config.data
            key = (model.path, model.revision, config_digest(data))
            try:
                if key not in self._prepared:
                    with self.context.raise_on_all_ranks():
                        self._prepared[key] = read_inputs(run.config)[2]
                plan = plan_run if run.train else _plan_base
                config, manifest = plan(run.config, self._prepared[key], self.context)
            except MissingDataError as error:
                settings = ", ".join(f"{key}: PATH" for key in error.keys)
                how = f"in an overlay, --overlay FILE with `set: {{{settings}}}`"
                raise MissingDataError(f"{run}: {error.what}", error.keys, how) from error
            except InputError as error:
                raise InputError(f"{run}: {error}") from error
            config = rendered(config, self._prepared[key])
            self.planned[str(run)] = replace(run, config=config, manifest=manifest)

    def _check_conditions(self) -> None:
        with self.context.raise_on_all_ranks():
            if self.context.is_main:
                runs = self.planned.values()
                check_conditions(map(resumed, runs) if self.resume else runs)

    def _open(self) -> None:
        """Save the configuration; without --resume, remove what an earlier comparison left."""
        with wrap_os_errors(self.folder):
            if not self.resume:
                # All at once: a later --resume must not take a run of the earlier comparison for one of this.
                (self.folder / SCORED).unlink(missing_ok=True)
                shutil.rmtree(self.folder / UNTRAINED, ignore_errors=True)
                for run in (run for run in self.runs if run.train):
                    with run.directory.locked():
                        run.directory.clear()
            write_text(self.folder / CONFIG_COPY, dump_config(self.config))

    def _score_untrained(self, item: Item) -> list[Scores]:
        """Score an arm that is a base model with settings."""
        started = time.perf_counter()
        run = self.planned[str(item.runs[0])]
        self.context.say(f"\n== {item}: not trained")
        scores, fresh = self._score(run, None, run.directory.path)
        self._finish(item, run, scores, time.perf_counter() - started, again=not fresh)
        return scores

    def _run_grids(self) -> list[GridPoint]:
        """Train every point of every arm's grid with the first seed, score it, and choose."""
        points = []
        for item in (item for item in self.items if item.on_validation):
            run = self.planned[str(item.runs[0])]
            points.append(_grid_point(run, self._train_and_score(item, run)))
        return choose(points)

    def _chosen_before(self) -> dict[str, Mapping[str, Any]]:
        """The chosen settings of each arm, all of whose points an earlier process has trained and scored."""
        points, unfinished = [], set()
        for run in (self.planned[str(item.runs[0])] for item in self.items if item.on_validation):
            reports = run.directory.validation
            if run.is_trained and self._is_scored(
                run, run.directory.finished_adapter(), reports, "validation"
            ):
                points.append(_grid_point(run, read_reports(reports)))
            else:
                unfinished.add(run.arm)
        chosen = choose([point for point in points if point.arm not in unfinished])
        return {point.arm: point.settings for point in chosen if point.chosen}

    def _train_and_score(self, item: Item, run: ArmRun) -> list[Scores]:
        """Train a run where it has not finished, and score it on the split of its item."""
        started, directory = time.perf_counter(), run.directory
        self.context.say(f"\n== {run}: {directory.path}")
        trained = self.context.gather([run.is_trained])[0]
        if not trained:
            self._train(run)
        split: Split = "validation" if item.on_validation else "test"
        reports = directory.validation if item.on_validation else directory.evaluation
        scores, fresh = self._score(run, directory.finished_adapter(), reports, split)
        if fresh and self.context.is_main:
            print(*(f"{sentence}\n" for sentence in renew_run_cards(directory)), sep="", end="")
        seconds = time.perf_counter() - started
        self._finish(item, run, scores, seconds, again=trained and not fresh)
        return scores

    def _train(self, run: ArmRun) -> None:
        """Train a run, or take the training of one that differs in how it is scored alone."""
        settings = training_settings(run.config)
        alike = (
            name
            for name, other in self.planned.items()
            if other.train and training_settings(other.config) == settings and other.is_trained
        )
        found = self.context.gather([next(alike, None)])[0]
        if found is None:
            train(run.config, resume="auto" if self.resume else None, context=self.context)
            return
        self.context.say(f"{run} is trained as {found}, whose settings of the training are the same")
        with self.context.on_main_rank(run.directory.locked), self.context.raise_on_all_ranks():
            if self.context.is_main:
                source = self.planned[found].directory
                _copy_training(source, self._name(source.path), run)

    def _finish(
        self, item: Item, run: ArmRun, scores: Sequence[Scores], seconds: float, *, again: bool
    ) -> None:
        """Report progress; what an earlier process did counts by the times that it wrote down."""
        measured = sum(score.seconds for score in scores)
        if item.trains:
            measured += sum(m.seconds for m in read_metrics(run.directory.metrics_file))
        self.progress.finish(item, scores, max(seconds, measured), again=again)

    def _score_bases(self, runs: Sequence[ArmRun]) -> dict[str, list[Scores]]:
        """Score each distinct base of the trained arms without their adapters.

        Returns: scores, by a name with the arms of one among several.
        """
        arms: dict[str, list[str]] = {}
        scores = {}
        # An arm without training has been scored already, and may be what another arm was trained on.
        for run in sorted(runs, key=lambda run: run.train):
            of_base = arms.setdefault(json.dumps(_inputs(run, None)), [])
            if not of_base:
                scores[run.arm] = self._score(run, None, self.folder / UNTRAINED / run.arm)[0]
            if run.arm not in of_base:
                of_base.append(run.arm)
        named = {}
        trained = {run.arm for run in runs if run.train}
        bases = [of for of in arms.values() if trained.intersection(of)]
        for of in bases:
            name = f"base of {', '.join(arm for arm in of if arm in trained)}" if len(bases) > 1 else "base"
            named[name] = scores[of[0]]
        return named

    def _score(
        self, run: ArmRun, adapter: Path | None, reports: Path, split: Split = "test"
    ) -> tuple[list[Scores], bool]:
        """Score a run's adapter, or its base, unless the reports are complete and of the same inputs.

        Args:
            adapter: None scores the base.
            reports: folder of the reports; `scored.json` of the comparison records what they are of.
        Returns: the scores, and whether they were computed now.
        """
        fresh = not self.context.gather([self._is_scored(run, adapter, reports, split)])[0]
        if fresh:
            config = _scored_config(run.config, split)
            evaluate_adapter(config, adapter, self.context, folder=reports, split=split)
            with self.context.raise_on_all_ranks():
                if self.context.is_main:
                    entry = {"inputs": _inputs(run, adapter, split), "files": _digests(reports)}
                    write_json(self.folder / SCORED, self._record() | {self._name(reports): entry})
        return read_reports(reports), fresh

    def _is_scored(self, run: ArmRun, adapter: Path | None, reports: Path, split: Split) -> bool:
        """Whether the reports are complete and of the same inputs."""
        entry = {"inputs": _inputs(run, adapter, split), "files": _digests(reports)}
        return bool(self._record().get(self._name(reports)) == entry)

    def _record(self) -> dict[str, Any]:
        file = self.folder / SCORED
        return read_json(file) if file.exists() else {}

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self.folder))


def _copy_training(source: RunDirectory, name: str, run: ArmRun) -> None:
    """Take the training of another run, which differs in how it is scored alone, in place of one's own.

    The loss plot and the model cards name their run, and are made anew.

    Args:
        name: of the other run's folder in the comparison.
    Raises: InputError: it cannot be copied.
    """
    from qdora.experiments.plots import plot_run  # with matplotlib

    directory = run.directory
    directory.clear()
    directory.start(run.config, {"trained_in": name} | source.manifest())
    with wrap_os_errors(directory.path):
        shutil.copy(source.metrics_file, directory.metrics_file)
        plot_run(directory)
        # Last, since a run that has its adapter counts as finished.
        for path in (source.best_adapter, source.adapter):
            if path.is_dir():
                with atomic_directory(directory.path / path.name) as staged:
                    leave_out = shutil.ignore_patterns(CARD_FILE)
                    shutil.copytree(path, staged, dirs_exist_ok=True, ignore=leave_out)
    write_run_cards(directory)


def _grid_point(run: ArmRun, scores: Sequence[Scores]) -> GridPoint:
    correct, total = sum(s.correct for s in scores), sum(s.total for s in scores)
    return GridPoint(run.arm, run.point, correct, total, False, str(run.directory.path))


def _plan_base(
    config: RunConfig, data: PreparedData, context: DistributedContext
) -> tuple[RunConfig, dict[str, Any]]:
    """`plan_run` of a base model that is scored without training; a collective.

    Raises: InputError: the model cannot be loaded in its format.
    """
    with context.raise_on_all_ranks():
        checkpoint = open_checkpoint(config.model.path, config.model.revision)
    meta, _ = build_adapted(checkpoint, config.model, context, lambda model: None)
    fields = {
        "base": {"fingerprint": base_fingerprint(meta.model)},
        "data": data.counts(),
        "compute_dtype": str(compute_dtype(config.model.dtype, context.device)),
    }
    return config, make_manifest(config, world_size=context.world_size, fields=fields)


def _scored_config(config: RunConfig, split: Split) -> RunConfig:
    """The configuration by which a split is scored: a limit is one of test questions."""
    if split == "test":
        return config
    return config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"limit": None})})


def _inputs(run: ArmRun, adapter: Path | None, split: Split = "test") -> dict[str, Any]:
    """What decides the scores of a run's base, or of its adapter."""
    evaluation = {"every"} if adapter else {"every", "quantization"}
    shots = run.config.evaluation.shots > 0
    unused = {"data": {"validation"} if shots else {"train", "validation"}, "evaluation": evaluation}
    kept = {"model", "data", "evaluation"}
    return {
        "config": _scored_config(run.config, split).model_dump(mode="json", include=kept, exclude=unused),
        split: run.manifest["data"]["fingerprints"][split],
        # The shots are drawn from it.
        "shots": run.manifest["data"]["fingerprints"]["train"] if shots else None,
        "adapter": adapter and file_digest(adapter / "adapter_model.safetensors"),
        "rules": RULES,
    }


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: file_digest(path) for path in sorted(folder.glob("*.json*"))}
