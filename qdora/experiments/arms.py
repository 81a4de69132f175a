"""Arms of a comparison: runs that differ in declared keys and agree in all that does not follow from them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from itertools import chain, permutations
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from qdora.config import OutputConfig, RunConfig, Section
from qdora.config_file import check_config, dotted, set_key
from qdora.errors import InputError, suggest
from qdora.evaluation.scores import Scores
from qdora.experiments.grid import grid_points, point_name, show_settings
from qdora.run import RunDirectory
from qdora.training.metrics import StepMetrics, read_metrics

_MODEL = ("model.path", "model.revision")
_BATCHES = (*_MODEL, "data", "training.batch_size")
_UPDATES = ("adapter.from", *(f"adapter.{key}" for key in ("type", "init", "r", "rank_pattern", "targets")))

CONDITIONS: Mapping[str, Sequence[str]] = {
    "base.fingerprint": _MODEL,
    "base.parameters": (*_MODEL, "training.mode", "adapter.trainable_tokens"),
    "data.train": (*_MODEL, "data"),
    "data.fingerprints.train": (*_MODEL, "data"),
    # Every difference of scores is taken over the same questions, so no key excuses other ones.
    "data.fingerprints.test": (),
    # The best of a grid is chosen on the same questions, which no arm was trained on.
    "data.fingerprints.validation": (),
    "batch_order": _BATCHES,
    "steps": (*_BATCHES, "training.max_steps", "training.epochs"),
    "seeds.training": (),
    "seeds.data": ("data.train.seed",),
    "initial_a": (*_MODEL, *_UPDATES, "training.mode"),
    "compute_dtype": ("model.dtype",),
    "processes": (),
}
"""Fields of manifests on which the arms of a seed agree, unless they differ in one of these keys."""

_NOT_OF_ARMS = {
    "output": "output of the comparison",
    "training.seed": "seeds of the comparison",
    "evaluation.limit": "set of the comparison, since all arms answer the same questions",
    "data.validation": "set of the comparison, since all arms leave out the same examples",
}
"""Keys that an arm may not set, and where they belong."""

_NOT_SWEPT = {
    "output": "output of the comparison",
    "training.seed": "seeds of the comparison",
    "evaluation": "set of an arm, since it changes nothing that is trained",
    "data.test": "set of the comparison, since all arms answer the same questions",
    "data.validation": "set of the comparison, since all points are scored on the same examples",
    "data.train.seed": "set of the comparison, since it decides which examples are left out for validation",
}
"""Keys that a grid may not have, and where they belong."""

OF_TRAINING = ("adapter", "training", "evaluation.every", "evaluation.quantization")
"""Keys that change nothing about a base model that is only scored."""

AVERAGE = "average"
"""Where a task's name stands: the unweighted mean over tasks."""

_OF_COMPARISON = ("output", "training.seed")
UNTRAINED = "base"
"""Folder of the scores of models that nothing was trained on."""
SWEPT = "grid"
"""Folder of the runs of arms that have a grid."""
# A finished arm is scored again where its evaluation has changed; the others do not change what is trained.
_FREE_TO_CHANGE = ("evaluation", "training.save_every", "training.keep_checkpoints")

Sweep = dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]]
"""Values by dotted key; their cartesian product is a grid."""


class ArmConfig(Section):
    """One arm of a comparison: the settings in which it differs from the shared configuration."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]
    """Name in the report and in the run's folder; no two arms share one."""
    train: bool = True
    """`false`: the base is scored with the arm's settings, and nothing is trained (docs/experiments.md)."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Overrides by dotted key: any but `output`, `training.seed`, `evaluation.limit`, `data.validation` and
    swept keys, which the comparison has. A section as a value replaces the section."""
    may_differ: tuple[str, ...] | None = None
    """Keys or sections in which the arm may differ from others; those of `set` and `sweep` if not given."""
    sweep: Sweep | None = None
    """A grid of its own in place of the comparison's, with as many points."""

    @property
    def axes(self) -> tuple[str, ...]:
        """Keys or sections in which this arm may differ."""
        return tuple(self.set) if self.may_differ is None else self.may_differ

    @model_validator(mode="after")
    def _sets_its_own_keys(self) -> ArmConfig:
        for key, instead in _NOT_OF_ARMS.items():
            if any(covers([key], found) for found in dotted(self.set)):
                raise ValueError(f"arm {self.name!r} sets {key}, which an arm may not; use {instead}")
        for key in self.set:
            if not covers(self.axes, key):
                allowed = ", ".join(self.axes) or "nothing"
                raise ValueError(f"arm {self.name!r} sets {key}; its may_differ covers only: {allowed}")
        return self

    @model_validator(mode="after")
    def _untrained_sets_what_counts(self) -> ArmConfig:
        if self.train:
            return self
        if self.sweep is not None:
            raise ValueError(f"arm {self.name!r} is not trained (train: false), so it has no sweep")
        for key in dotted(self.set):
            if covers(OF_TRAINING, key):
                raise ValueError(
                    f"arm {self.name!r} sets {key}, which changes nothing where nothing is trained (train: "
                    f"false); allowed there: keys of model, data and evaluation"
                )
        return self


class CompareConfig(Section):
    """Arms trained under identical conditions."""

    base: str | dict[str, Any]
    """The run configuration of all arms: a file, relative to this one, `qdora:NAME`, or its sections."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Overrides of the shared configuration for all arms: dotted key, value."""
    arms: tuple[ArmConfig, ...]
    """The arms. The first one is the reference of every difference."""
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0,)
    """Each arm is trained once with each; replaces `training.seed`."""
    sweep: Sweep = Field(default_factory=dict)
    """Values by dotted key: the grid of every trained arm, the product of all (docs/experiments.md)."""
    output: OutputConfig
    """See `output`. Each run lies in `ARM-seedN` below `dir`, those of a grid in `grid/ARM/POINT-seedN`."""
    small: tuple[str, ...] = ()
    """Overlays of `compare --small`, with paths as that of `base`; see docs/configuration.md."""
    published: dict[str, dict[str, Annotated[float, Field(ge=0, le=100)]]] = Field(default_factory=dict)
    """Published percent of exact match by arm and task, or `average` for the mean over tasks, shown beside
    this comparison's figures: `{qdora: {boolq: 74.6}}`."""
    published_source: str | None = None
    """Where they are published; required with `published`."""

    @model_validator(mode="after")
    def _published_of_arms(self) -> CompareConfig:
        names = [arm.name for arm in self.arms]
        for name in self.published:
            if name not in names:
                raise ValueError(f"published: there is no arm {name!r}; {suggest(name, names)}")
        if bool(self.published) != bool(self.published_source):
            given, missing = ("published", "published_source")[:: 1 if self.published else -1]
            raise ValueError(f"{given} is given without {missing}; give both, or none")
        return self

    @model_validator(mode="after")
    def _distinct(self) -> CompareConfig:
        if len(self.arms) < 2:
            raise ValueError(f"arms: at least 2 items make a comparison, got {len(self.arms)}")
        for what, values in {"arm names": [arm.name for arm in self.arms], "seeds": self.seeds}.items():
            repeated = sorted({str(value) for value in values if values.count(value) > 1})
            if repeated:
                raise ValueError(f"{what} repeat: {', '.join(repeated)}")
        return self

    @model_validator(mode="after")
    def _grids(self) -> CompareConfig:
        _check_sweep("the comparison", self.sweep)
        trained = [arm for arm in self.arms if arm.train]
        for arm in trained:
            if arm.sweep is not None:
                _check_sweep(f"arm {arm.name!r}", arm.sweep)
            for key, swept in ((key, swept) for key in arm.set for swept in self.sweep_of(arm)):
                if covers([key], swept) or covers([swept], key):
                    raise ValueError(
                        f"arm {arm.name!r} sets {key}, but {swept} is swept; take it out of set, or give the "
                        f"arm a sweep of its own, with as many points"
                    )
        points = {arm.name: len(grid_points(self.sweep_of(arm))) for arm in trained}
        if len({*points.values()}) > 1:
            found = ", ".join(f"{name} {count}" for name, count in points.items())
            raise ValueError(
                f"sweep: arms have grids of different sizes: {found}; give all the same number of points, so "
                f"that none is tuned more than another"
            )
        return self

    def sweep_of(self, arm: ArmConfig) -> Mapping[str, Sequence[Any]]:
        """The values by swept key of an arm; empty where it has no grid."""
        if not arm.train:
            return {}
        return self.sweep if arm.sweep is None else arm.sweep


def _check_sweep(whose: str, sweep: Mapping[str, Sequence[Any]]) -> None:
    """Raises: ValueError: a key that may not be swept, swept twice, or with a value given twice."""
    for key, values in sweep.items():
        for owned, instead in _NOT_SWEPT.items():
            if covers([owned], key) or covers([key], owned):
                raise ValueError(f"{whose} sweeps {key}, which no grid may; use {instead}")
        shown = [json.dumps(value) for value in values]
        repeated = sorted({value for value in shown if shown.count(value) > 1})
        if repeated:
            raise ValueError(f"{whose} sweeps {key} over repeated values: {', '.join(repeated)}")
    for one, other in permutations(sweep, 2):
        if covers([one], other):
            raise ValueError(f"{whose} sweeps {one} and {other}, which is part of it; sweep one of them")


@dataclass(frozen=True)
class ArmRun:
    """One arm with one seed, at one point of its grid where it has one.

    Attributes:
        arm: name of the arm.
        seed: of the training; the first one where nothing is trained.
        config: of the run.
        manifest: that it would write, as far as that is known before training; then that it wrote.
        steps: its metrics, once it is trained; empty where nothing is.
        scores: by task, of its trained adapter, or of the base model where nothing is trained.
        train: whether anything is trained.
        point: the swept keys with their values; empty where the arm has no grid.
    """

    arm: str
    seed: int
    config: RunConfig
    manifest: Mapping[str, Any] = field(default_factory=dict)
    steps: Sequence[StepMetrics] = ()
    scores: Sequence[Scores] = ()
    train: bool = True
    point: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        point = f", {show_settings(self.point)}" if self.point else ""
        return f"arm {self.arm!r}, seed {self.seed}{point}"

    @property
    def directory(self) -> RunDirectory:
        """Its run directory."""
        return RunDirectory(self.config.output.dir)

    @property
    def is_trained(self) -> bool:
        """Whether its directory has the adapter and the metrics of all steps that it was to make."""
        try:
            self.directory.finished_adapter()
            done = read_metrics(self.directory.metrics_file)
            stopped = self.config.training.patience and self.directory.manifest().get("stopped_early")
        except InputError:
            return False
        return len(done) == int(stopped or self.manifest["steps"])


def expand(tree: Mapping[str, Any], config: CompareConfig) -> list[ArmRun]:
    """The runs that a comparison may train or score, seed by seed.

    An arm without training has one, with the first seed. An arm with a grid has one for each point: with the
    first seed all are trained, with another seed the chosen one.

    Args:
        tree: the shared configuration, before it is checked.
    Raises: InputError: a run's configuration is wrong, or arms differ in keys in which they may not; a grid
        without a validation set.
    """
    runs = [
        ArmRun(arm.name, seed, arm_config(tree, config, arm, seed, point), train=arm.train, point=point)
        for seed in config.seeds
        for arm in config.arms
        if arm.train or seed == config.seeds[0]
        for point in grid_points(config.sweep_of(arm))
    ]
    first = runs[0]
    axes_of = {arm.name: {*arm.axes, *config.sweep_of(arm)} for arm in config.arms}
    for run in (run for run in runs[1:] if run.seed == first.seed):
        axes = axes_of[first.arm] | axes_of[run.arm]
        who = f"arms {first.arm!r} and {run.arm!r} differ"
        if run.arm == first.arm:
            who = f"points of the grid of arm {run.arm!r} differ"
        for key, (one, other) in differences([first.config, run.config]).items():
            if key in _NOT_OF_ARMS:  # a section that replaces another leaves its keys out
                raise InputError(f"{who} in {key}: {one!r} and {other!r}; use {_NOT_OF_ARMS[key]}")
            if not covers(axes, key):
                allowed = ", ".join(sorted(axes)) or "nothing"
                raise InputError(
                    f"{who} in {key}: {one!r} and {other!r}; they may differ in {allowed}. Give both the "
                    f"same, or name it in may_differ"
                )
    for run in runs:
        test = run.config.data.test
        if test is None:
            raise InputError(f"{run}: arms are compared on a test set, and data.test is not set")
        if test.name == AVERAGE:
            meaning = "is what the report calls the mean over tasks; choose another name"
            raise InputError(f"{run}: data.test.name {AVERAGE!r} {meaning}")
    swept = next((run for run in runs if run.point), None)
    if swept is not None and swept.config.data.validation is None:
        why = "the best point of a grid is chosen on examples that are left out of training"
        how = "say how many, for example in the comparison's set: {data.validation: 64}"
        raise InputError(f"sweep: {why}, and data.validation is null; {how}")
    return runs


def arm_config(
    tree: Mapping[str, Any],
    config: CompareConfig,
    arm: ArmConfig,
    seed: int,
    point: Mapping[str, Any] | None = None,
) -> RunConfig:
    """The configuration of one run: the shared one, the arm's settings, its point, the seed, its own folder.

    Raises: InputError: the shared configuration or a setting is wrong; the arm is named.
    """
    own, point = deepcopy(dict(tree)), point or {}
    folder = f"{arm.name}-seed{seed}"
    if not arm.train:
        folder = f"{UNTRAINED}/{arm.name}"
    elif point:
        folder = f"{SWEPT}/{arm.name}/{point_name(point)}-seed{seed}"
    given = {
        "training.seed": seed,
        "output.dir": str(Path(config.output.dir) / folder),
        "output.overwrite": config.output.overwrite,
    }
    named = f"arm {arm.name!r}" + (f", {show_settings(point)}" if point else "")
    try:
        for key, value in {**config.set, **arm.set, **point, **given}.items():
            set_key(own, key, deepcopy(value))
    except InputError as error:
        raise InputError(f"{named}: {error}") from None
    origin = config.base if isinstance(config.base, str) else "base"
    return check_config(own, RunConfig, f"{origin} with {named}")


def covers(keys: Iterable[str], key: str) -> bool:
    """Whether a dotted key is one of some keys, or lies in a section that is."""
    return any(f"{key}.".startswith(f"{one}.") for one in keys)


def differences(configs: Sequence[RunConfig]) -> dict[str, list[Any]]:
    """Values by dotted key, of the keys in which configurations differ; seed and output are left out."""
    flat = [dotted(config.model_dump(mode="json")) for config in configs]
    keys = [key for key in dict.fromkeys(chain.from_iterable(flat)) if not covers(_OF_COMPARISON, key)]
    found = {key: [one.get(key) for one in flat] for key in keys}
    return {key: values for key, values in found.items() if any(value != values[0] for value in values)}


def check_conditions(runs: Iterable[ArmRun]) -> None:
    """The arms of a seed agree in base, data, order, steps and initial A, or a key that differs decides it.

    Raises: InputError: they do not; the field of the manifests, both arms and the values are named.
    """
    firsts: dict[int, ArmRun] = {}
    # The first one has every field: those of a run that trains nothing lack what follows from training.
    for run in sorted(runs, key=lambda run: not run.train):
        first = firsts.setdefault(run.seed, run)
        keys = differences([first.config, run.config])
        for name, (one, other) in _unequal(first.manifest, run.manifest).items():
            excuses = CONDITIONS[name]
            if not any(covers(excuses, key) for key in keys):
                allowed = f"only arms that differ in {', '.join(excuses)} may" if excuses else "no arms may"
                raise InputError(
                    f"arms {first.arm!r} and {run.arm!r} differ in {name}: {one!r} and {other!r}, with seed "
                    f"{run.seed}; {allowed}"
                )


def resumed(run: ArmRun) -> ArmRun:
    """A finished run with the manifest that it wrote, by whatever processes; any other run as it is planned.

    Raises: InputError: the run was started with another configuration, data or launch; what differs is named.
    """
    directory, finished = run.directory, run.is_trained
    if not directory.config_file.is_file():
        return run
    changed = differences([directory.config(), run.config])
    if finished or any(directory.checkpoints.glob("step-*")):
        changed |= _unequal(directory.manifest(), run.manifest)
    free = {*_FREE_TO_CHANGE, *(("compute_dtype", "processes") if finished else ())}
    found = [f"{key} was {was!r}, is {now!r}" for key, (was, now) in changed.items() if not covers(free, key)]
    if found:
        raise InputError(
            f"{run}: {directory.path} was started with other settings: {'; '.join(found)}. Resume with "
            f"those, take another output.dir, or start anew without --resume: --set output.overwrite=true"
        )
    return replace(run, manifest=directory.manifest()) if finished else run


def _unequal(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The values of the conditions that two manifests both have and differ in; None is not known yet."""
    a, b = dotted(one), dotted(other)
    found = {name: [a.get(name), b.get(name)] for name in CONDITIONS}
    return {name: values for name, values in found.items() if None not in values and values[0] != values[1]}
