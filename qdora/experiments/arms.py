"""Arms of a comparison: runs that differ in declared keys and agree in all that does not follow from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from qdora.config import OutputConfig, RunConfig, Section
from qdora.config_file import check_config, dotted, set_key
from qdora.errors import InputError, suggest
from qdora.evaluation.scores import Scores
from qdora.run import RunDirectory
from qdora.training.metrics import StepMetrics, read_metrics

_MODEL = ("model.path", "model.revision")
_BATCHES = (*_MODEL, "data", "training.batch_size")
_UPDATES = ("adapter.type", "adapter.init", "adapter.r", "adapter.rank_pattern", "adapter.targets")

CONDITIONS: Mapping[str, Sequence[str]] = {
    "base.fingerprint": _MODEL,
    "base.parameters": (*_MODEL, "training.mode"),
    "data.train": (*_MODEL, "data"),
    "data.fingerprints.train": (*_MODEL, "data"),
    # Every difference of scores is taken over the same questions, so no key excuses other ones.
    "data.fingerprints.test": (),
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
}
"""Keys that an arm may not set, and where they belong."""

AVERAGE = "average"
"""Where a task's name stands: the unweighted mean over tasks."""

_OF_COMPARISON = ("output", "training.seed")
# A finished arm is scored again where its evaluation has changed; the others do not change what is trained.
_FREE_TO_CHANGE = ("evaluation", "training.save_every", "training.keep_checkpoints")


class ArmConfig(Section):
    """One arm of a comparison: the settings in which it differs from the shared configuration."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]
    set: dict[str, Any] = Field(default_factory=dict)
    """Overrides of the shared configuration by dotted key, as `--set` takes them."""
    may_differ: tuple[str, ...] | None = None
    """Keys or sections in which this arm may differ from the others; the keys of `set` where not given."""

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


class CompareConfig(Section):
    """Arms trained under identical conditions."""

    base: str
    """The run configuration shared by all arms, relative to this file."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Overrides of the shared configuration, as `--set` takes them."""
    arms: tuple[ArmConfig, ...]
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0,)
    """Each arm is trained once with each seed."""
    output: OutputConfig
    published: dict[str, dict[str, Annotated[float, Field(ge=0, le=100)]]] = Field(default_factory=dict)
    """Published percent of exact match by arm and task, or `average`; shown beside the report's figures."""
    published_source: str | None = None
    """Where they are published."""

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


@dataclass(frozen=True)
class ArmRun:
    """One arm with one seed.

    Attributes:
        arm: name of the arm.
        seed: of the training.
        config: of the run.
        manifest: that it would write, as far as that is known before training; then that it wrote.
        steps: its metrics, once it is trained.
        scores: by task, of its trained adapter.
    """

    arm: str
    seed: int
    config: RunConfig
    manifest: Mapping[str, Any] = field(default_factory=dict)
    steps: Sequence[StepMetrics] = ()
    scores: Sequence[Scores] = ()

    def __str__(self) -> str:
        return f"arm {self.arm!r}, seed {self.seed}"

    @property
    def directory(self) -> RunDirectory:
        """Its run directory."""
        return RunDirectory(self.config.output.dir)

    @property
    def is_trained(self) -> bool:
        """Whether its directory has the adapter and the metrics of all steps."""
        try:
            self.directory.finished_adapter()
            done = read_metrics(self.directory.metrics_file)
        except InputError:
            return False
        return len(done) == int(self.manifest["steps"])


def expand(tree: Mapping[str, Any], config: CompareConfig) -> list[ArmRun]:
    """The runs of a comparison, seed by seed.

    Args:
        tree: the shared configuration, before it is checked.
    Raises: InputError: a run's configuration is wrong, or arms differ in keys in which they may not.
    """
    runs = [
        ArmRun(arm.name, seed, arm_config(tree, config, arm, seed))
        for seed in config.seeds
        for arm in config.arms
    ]
    first, of_first = config.arms[0], runs[0]
    for arm, run in zip(config.arms[1:], runs[1:], strict=False):  # of the first seed
        axes = {*first.axes, *arm.axes}
        for key, (one, other) in differences([of_first.config, run.config]).items():
            if not covers(axes, key):
                allowed = ", ".join(sorted(axes)) or "nothing"
                raise InputError(
                    f"arms {first.name!r} and {arm.name!r} differ in {key}: {one!r} and {other!r}; they may "
                    f"differ in {allowed}. Give both the same, or name it in may_differ"
                )
    return runs


def arm_config(tree: Mapping[str, Any], config: CompareConfig, arm: ArmConfig, seed: int) -> RunConfig:
    """The configuration of one run: the shared one, the arm's settings, the seed, a folder of its own.

    Raises: InputError: the shared configuration or a setting is wrong; the arm is named.
    """
    own = deepcopy(dict(tree))
    given = {
        "training.seed": seed,
        "output.dir": str(Path(config.output.dir) / f"{arm.name}-seed{seed}"),
        "output.overwrite": config.output.overwrite,
    }
    try:
        for key, value in {**config.set, **arm.set, **given}.items():
            set_key(own, key, deepcopy(value))
    except InputError as error:
        raise InputError(f"arm {arm.name!r}: {error}") from None
    return check_config(own, RunConfig, f"{config.base} with arm {arm.name!r}")


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
    for run in runs:
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
