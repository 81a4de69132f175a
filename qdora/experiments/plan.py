"""The work of a comparison: its order, a line for each finished run, what is left, the page of a dry run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tabulate import tabulate

from qdora.config import RunConfig
from qdora.config_file import dotted
from qdora.evaluation.scores import Scores, read_reports
from qdora.experiments.arms import CONDITIONS, OF_TRAINING, ArmRun, CompareConfig, covers, differences
from qdora.experiments.grid import condensed, show_settings
from qdora.training.metrics import read_metrics


@dataclass(frozen=True)
class Item:
    """A run to train and score, or only to score.

    Attributes:
        runs: the run; one of these where the point of the grid is not chosen yet.
        trains: False where there is no adapter, or it is that of the grid's chosen point or of a run before.
        on_validation: whether it is a point of a grid.
    """

    runs: tuple[ArmRun, ...]
    trains: bool = True
    on_validation: bool = False

    @property
    def arm(self) -> str:
        """Name of the arm."""
        return self.runs[0].arm

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return self.runs[0].seed

    def __str__(self) -> str:
        run = self.runs[0]
        if not run.train:
            return run.arm
        point = f", {show_settings(run.point)}" if self.on_validation else ""
        return f"{run.arm} seed {run.seed}{point}"


def training_settings(config: RunConfig) -> dict[str, Any]:
    """What a training follows from: runs that agree in these differ in how they are scored alone."""
    tree = config.model_dump(mode="json", exclude={"output"})
    if config.training.keep_best != "exact_match" and not config.evaluation.every:
        tree["evaluation"] = {"loss_every": config.evaluation.loss_every}
    return tree


def plan_items(runs: Sequence[ArmRun], chosen: Mapping[str, Mapping[str, Any]] | None = None) -> list[Item]:
    """The work of a comparison in its order: untrained arms, grids, then each arm with each seed.

    Args:
        runs: of `expand`.
        chosen: settings of the chosen point by arm, where it is known.
    """
    chosen = chosen or {}
    first = runs[0].seed
    trained: list[dict[str, Any]] = []

    def is_new(run: ArmRun) -> bool:
        settings = training_settings(run.config)
        known = settings in trained
        trained.append(settings)
        return not known

    items = [Item((run,), trains=False) for run in runs if not run.train]
    items += [Item((run,), is_new(run), True) for run in runs if run.point and run.seed == first]
    by_arm: dict[tuple[int, str], list[ArmRun]] = {}
    for run in runs:
        if run.train and run.point == chosen.get(run.arm, run.point):
            by_arm.setdefault((run.seed, run.arm), []).append(run)
    for (seed, _), candidates in by_arm.items():
        trains = seed != first or not candidates[0].point
        items.append(Item(tuple(candidates), trains and (len(candidates) > 1 or is_new(candidates[0]))))
    return items


def show_duration(seconds: float) -> str:
    """Seconds as a person says them: `12 s`, `4 min 12 s`, `46 min`, `3 h 10 min`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{int(seconds // 60)} min {int(seconds % 60)} s" if seconds < 600 else f"{minutes} min"


def show_scores(scores: Sequence[Scores]) -> str:
    """The score of the only task, or the mean over the tasks."""
    mean = statistics.fmean(score.score for score in scores)
    several = f" (mean of {len(scores)} tasks)" if len(scores) > 1 else ""
    return f"{scores[0].metric.replace('_', ' ')} {100 * mean:.1f}%{several}"


@dataclass
class Progress:
    """Says a line for each finished item of work, with the time that is left.

    Attributes:
        items: all of the comparison, in any order.
        say: prints a line.
    """

    items: Sequence[Item]
    say: Callable[[str], None]
    _seconds: dict[tuple[str, bool], list[float]] = field(default_factory=dict)
    _finished: list[str] = field(default_factory=list)

    def finish(self, item: Item, scores: Sequence[Scores], seconds: float, *, again: bool = False) -> None:
        """Say that an item is finished.

        Args:
            scores: of the split that it is scored on.
            seconds: that all of it took.
            again: it was finished before this process started.
        """
        self._seconds.setdefault((item.arm, item.trains), []).append(seconds)
        self._finished.append(str(item))
        split = "validation " if item.on_validation else ""
        took = "finished before" if again else show_duration(seconds)
        left = "" if again else self._left()  # of those that come next, some are finished too
        self.say(
            f"[{len(self._finished)}/{len(self.items)}] {item}: {split}{show_scores(scores)}, {took}"
            + (f"; {left}" if left else "")
        )

    def _left(self) -> str:
        remaining = [item for item in self.items if str(item) not in self._finished]
        if not remaining:
            return ""
        seconds = [self._median(item) for item in remaining]
        known = [value for value in seconds if value is not None]
        if len(known) < len(seconds):
            return "time left unknown"
        return f"about {show_duration(sum(known))} left"

    def _median(self, item: Item) -> float | None:
        """Of the arm's finished items where there are some, else of all arms'."""
        own = self._seconds.get((item.arm, item.trains))
        others = [s for (_, trains), of in self._seconds.items() if trains or not item.trains for s in of]
        found = own or others
        return statistics.median(found) if found else None


class MeasuredTimes:
    """Times of what a comparison has trained and scored already, from the files of its runs."""

    def __init__(self, runs: Iterable[ArmRun]) -> None:
        self._step: dict[str, list[float]] = {}
        self._question: dict[str, list[float]] = {}
        for run in runs:
            directory = run.directory
            self._step.setdefault(run.arm, []).extend(m.seconds for m in read_metrics(directory.metrics_file))
            for folder in (directory.evaluation, directory.validation) if run.train else (directory.path,):
                for score in read_reports(folder):
                    self._question.setdefault(run.arm, []).append(score.seconds / score.total)

    def has_steps(self, arm: str) -> bool:
        """Whether a run of the arm has trained a step."""
        return bool(self._step.get(arm))

    def of_step(self, arm: str) -> float | None:
        """Median seconds of a training step: of the arm, else of all arms; None where none has trained."""
        return _median_of(self._step, arm)

    def of_question(self, arm: str) -> float | None:
        """Median seconds of a scored question, likewise."""
        return _median_of(self._question, arm)


def _median_of(by_arm: Mapping[str, Sequence[float]], arm: str) -> float | None:
    found = by_arm.get(arm) or [value for values in by_arm.values() for value in values]
    return statistics.median(found) if found else None


def dry_run_page(
    config: CompareConfig,
    runs: Sequence[ArmRun],
    chosen: Mapping[str, Mapping[str, Any]],
    *,
    resume: bool,
) -> str:
    """What a comparison is going to do.

    Args:
        config: of the comparison.
        runs: of `expand`, with the manifest that they would write.
        chosen: settings of the chosen point, of arms whose grid is finished.
        resume: whether what is finished is kept.
    """
    firsts = {run.arm: run for run in reversed(runs) if run.seed == runs[0].seed}
    shown = [firsts[arm.name] for arm in config.arms]
    times = MeasuredTimes(runs)
    rows, seconds = [], []
    for item in plan_items(runs, chosen):
        left = _seconds_left(item, times, resume=resume)
        seconds.append(left)
        time = "unknown" if left is None else show_duration(left) if left else ""
        rows.append([str(item), *_figures(item), _state(item, resume=resume), time])
    headers = ["run", "steps", "training examples", "trained parameters", "state", "time"]
    seeds = ", ".join(map(str, config.seeds))
    parts = [
        f"{len(config.arms)} arms, seeds {seeds}, in {config.output.dir}; nothing is written",
        _settings_table(config, shown),
        _identity(shown),
        _leaks(shown),
        tabulate(rows, headers, tablefmt="github", disable_numparse=True),
        _total(seconds, times, config),
    ]
    return "\n\n".join(parts)


def _settings_table(config: CompareConfig, shown: Sequence[ArmRun]) -> str:
    """What the arms differ in, and over which values a key is swept."""
    swept = [key for arm in config.arms for key in config.sweep_of(arm)]
    keys = dict.fromkeys([*differences([run.config for run in shown]), *swept])
    columns = [
        _settings(config.sweep_of(arm), run, keys) for arm, run in zip(config.arms, shown, strict=True)
    ]
    rows = [["trained", *("yes" if run.train else "no, base model" for run in shown)]]
    settings = condensed({key: [column[key] for column in columns] for key in keys})
    rows += [[key, *values] for key, values in settings.items()]
    return tabulate(rows, ["", *(run.arm for run in shown)], tablefmt="github", disable_numparse=True)


def _settings(sweep: Mapping[str, Sequence[Any]], run: ArmRun, keys: Iterable[str]) -> dict[str, str]:
    """An arm's values; blank where nothing is trained and they only decide training."""
    values = dotted(run.config.model_dump(mode="json"))
    shown = {key: _plain(values.get(key)) for key in keys if run.train or not covers(OF_TRAINING, key)}
    for key, several in sweep.items():
        shown[key] = "sweep: " + ", ".join(map(_plain, several))
    return {key: shown.get(key, "") for key in keys}


def _plain(value: Any) -> str:
    return show_settings({"": value})[1:]


def _identity(shown: Sequence[ArmRun]) -> str:
    manifests = [dotted(run.manifest) for run in shown]
    same: list[str] = []
    other: list[str] = []
    for name in CONDITIONS:
        values = [manifest[name] for manifest in manifests if manifest.get(name) is not None]
        if values:
            (same if all(value == values[0] for value in values) else other).append(name)
    text = f"Identity checks passed. The same in all arms: {', '.join(same)}."
    if other:
        text += f" Different only where a key that differs decides it: {', '.join(other)}."
    return f"{text} The base model's weights are compared when they are read."


def _leaks(shown: Sequence[ArmRun]) -> str:
    lines = []
    counts: dict[str, list[str]] = {}
    for run in shown:
        data = run.manifest["data"]
        text = f"{data['leaked_questions_removed']} removed from training as test questions"
        if "validation" in data:
            removed = data["leaked_validation_questions_removed"]
            text += f", {removed} as validation questions; {data['validation']} validation examples"
        counts.setdefault(f"{text}; {data['test']} test examples", []).append(run.arm)
    for text, arms in counts.items():
        lines.append(f"Leaks: {text}" + (f" ({', '.join(arms)})" if len(counts) > 1 else "") + ".")
    return "\n".join(lines)


def _figures(item: Item) -> list[str]:
    """Steps, examples and trained parameters; a range where the points of a grid differ in them."""
    if not item.runs[0].train:
        return ["", "", ""]
    columns = (
        [run.manifest["steps"] for run in item.runs],
        [run.manifest["data"]["train"] for run in item.runs],
        [run.manifest["trainable_parameters"] for run in item.runs],
    )
    return [f"{min(c):,}" if min(c) == max(c) else f"{min(c):,} to {max(c):,}" for c in columns]


def _state(item: Item, *, resume: bool) -> str:
    if len(item.runs) > 1:
        chosen = f"at the chosen of {len(item.runs)} points"
        return chosen if item.trains else f"{chosen}: only scored"
    if not resume:
        return "new"
    run = item.runs[0]
    scored = _is_scored(item)
    if not run.train:
        return "scored" if scored else "new"
    if run.is_trained:
        return "trained, scored" if scored else "trained"
    done = len(read_metrics(run.directory.metrics_file))
    return f"after step {done}" if done else "new"


def _is_scored(item: Item) -> bool:
    """Whether the only run of an item has reports of the split that it is scored on."""
    run = item.runs[0]
    folder = run.directory.evaluation if run.train else run.directory.path
    return any((run.directory.validation if item.on_validation else folder).glob("*.json"))


def _seconds_left(item: Item, times: MeasuredTimes, *, resume: bool) -> float | None:
    """Of what an item has not finished; None where nothing like it has been measured."""
    run, alone = item.runs[0], resume and len(item.runs) == 1
    data, limit = run.manifest["data"], run.config.evaluation.limit
    questions = data["validation"] if item.on_validation else min(data["test"], limit or data["test"])
    if alone and _is_scored(item):
        questions = 0
    steps = max(run.manifest["steps"] for run in item.runs) if item.trains else 0
    if alone and item.trains:
        steps = 0 if run.is_trained else steps - len(read_metrics(run.directory.metrics_file))
    total = 0.0
    for count, each in (steps, times.of_step(item.arm)), (questions, times.of_question(item.arm)):
        if count and each is None:
            return None
        total += count * (each or 0)
    return total


def _total(seconds: Sequence[float | None], times: MeasuredTimes, config: CompareConfig) -> str:
    known = [value for value in seconds if value is not None]
    if len(known) < len(seconds):
        return "Estimated time: unknown until the first arm has been trained and scored."
    measured = [arm.name for arm in config.arms if times.has_steps(arm.name)]
    others = [arm.name for arm in config.arms if arm.train and arm.name not in measured]
    text = f"Estimated time: about {show_duration(sum(known))}"
    if measured:
        text += f", from the steps and answers of {', '.join(measured)}"
    if others and measured:
        text += f"; taken to be like them: {', '.join(others)}"
    return f"{text}. Without loading, and scoring base models."
