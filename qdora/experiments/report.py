"""The figures of a comparison as plain values, and the files that show them."""

from __future__ import annotations

import statistics as averages
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path, PurePath
from typing import Any

from qdora.adapters.base import describe
from qdora.config_file import dotted
from qdora.evaluation.scores import Prediction, Scores, wilson_interval
from qdora.experiments.arms import (
    AVERAGE,
    CONDITIONS,
    ArmRun,
    check_conditions,
    differences,
)
from qdora.experiments.grid import GridPoint, edges
from qdora.experiments.pages import answers_table, html, markdown, tables
from qdora.experiments.statistics import Answers, Difference, difference, estimate, holm, verdict
from qdora.files import write_json, write_text

_LISTED = 20
_LONGEST_ANSWER = 60


@dataclass(frozen=True)
class Measure:
    """One column of the tables: a scorer's exact match on a task, or its mean over all tasks.

    Attributes:
        task: name, or `average`.
        scorer: name; `headline` where the tasks of a mean have different ones.
        headline: whether it is the headline scorer's.
        parts: task and scorer of each task that it is a mean of.
    """

    task: str
    scorer: str
    headline: bool
    parts: tuple[tuple[str, str], ...]

    @property
    def family(self) -> str:
        """Differences of one family are corrected together: a table of one scorer."""
        return "" if self.headline else self.scorer


def build_report(
    runs: Sequence[ArmRun],
    bases: Mapping[str, Sequence[Scores]],
    grid: Sequence[GridPoint] = (),
    *,
    published: Mapping[str, Mapping[str, float]] | None = None,
    published_source: str | None = None,
) -> dict[str, Any]:
    """All figures as plain values; the first arm is the reference of every difference.

    Args:
        runs: every arm with every seed; an arm without training once.
        bases: scores of the base models without adapters, by task, and a name for each.
        grid: points out of which the settings of arms were chosen.
        published: percent by arm and task, shown beside these figures.
        published_source: where they are published.
    Raises:
        InputError: as `check_conditions`.
        ValueError: runs do not answer the same questions of a task.
    """
    check_conditions(runs)
    arms: dict[str, list[ArmRun]] = {}
    for run in runs:
        arms.setdefault(run.arm, []).append(run)
    reference = runs[0]
    measures = _measures(reference.scores)
    # What follows from training is compared among the arms that are trained.
    trained = [run for run in runs if run.steps] or list(runs)
    manifests = [dotted(run.manifest) for run in trained if run.seed == trained[0].seed]
    settings = differences([of_arm[0].config for of_arm in arms.values()])
    compared = _compare(arms, reference.arm, measures)
    results = {name: _results(of_arm, measures, compared[name]) for name, of_arm in arms.items()}
    at_edge = edges(grid)
    return {
        "title": _title(list(arms)),
        "reference": reference.arm,
        "metric": reference.scores[0].metric.replace("_", " "),
        "seeds": sorted({run.seed for run in runs}),
        "tasks": {
            scores.task: {"total": scores.total, "scorers": list(_scorers(scores))}
            for scores in reference.scores
        },
        "conditions": {
            field: value
            for field, value in manifests[0].items()
            if field in CONDITIONS and all(other.get(field) == value for other in manifests)
        },
        "differences": {key: dict(zip(arms, values, strict=True)) for key, values in settings.items()},
        "bases": {
            name: _results([ArmRun(name, 0, reference.config, scores=scores)], measures, {})
            for name, scores in bases.items()
        },
        "arms": {name: {**_costs(of_arm), **results[name]} for name, of_arm in arms.items()},
        "published": _published(published or {}, published_source, results),
        "grid": [_grid_point(point, at_edge) for point in grid],
        "data": _data({name: of_arm[0].manifest["data"] for name, of_arm in arms.items()}),
        "disagreements": {scores.task: _disagreements(runs, scores.task) for scores in reference.scores},
        "manifest": _manifest(trained),
    }


def write_report(
    folder: Path,
    runs: Sequence[ArmRun],
    bases: Mapping[str, Sequence[Scores]],
    grid: Sequence[GridPoint] = (),
    *,
    published: Mapping[str, Mapping[str, float]] | None = None,
    published_source: str | None = None,
) -> dict[str, Any]:
    """Write report.json, report.html, report.md, three tables (CSV) and comparison.png.

    Args:
        folder: of the comparison.
        runs, bases, grid, published, published_source: as `build_report`.
    Returns: the report.
    Raises: InputError: as `build_report`; a file cannot be written.
    """
    report = build_report(runs, bases, grid, published=published, published_source=published_source)
    write_json(folder / "report.json", report)
    write_text(folder / "report.md", markdown(report))
    for name, text in tables(report).items():
        write_text(folder / name, text)
    write_text(folder / "answers.csv", answers_table(runs))
    from qdora.experiments.plots import figures, plot_comparison  # with matplotlib

    plot_comparison(runs, report, folder / "comparison.png")
    write_text(folder / "report.html", html(report, figures(runs, report)))
    return report


def _title(arms: Sequence[str]) -> str:
    if len(arms) <= 3:
        return " against ".join(arms)
    return f"{len(arms) - 1} arms against {arms[0]}"


def _scorers(scores: Scores) -> tuple[str, ...]:
    """Names of a task's scorers, the headline scorer first."""
    return tuple(sorted(scores.per_scorer, key=lambda name: name != scores.scorer))


def _measures(tasks: Sequence[Scores]) -> list[Measure]:
    """Every scorer of every task; then means over tasks, of the headline scorers and of any that all have."""
    by_task = {scores.task: _scorers(scores) for scores in tasks}
    found = [
        Measure(task, scorer, number == 0, ((task, scorer),))
        for task, scorers in by_task.items()
        for number, scorer in enumerate(scorers)
    ]
    if len(by_task) == 1:
        return found
    headlines = {task: scorers[0] for task, scorers in by_task.items()}
    distinct = set(headlines.values())
    name = distinct.pop() if len(distinct) == 1 else "headline"
    found.append(Measure(AVERAGE, name, True, tuple(headlines.items())))
    first, *others = by_task.values()
    for scorer in first:
        if scorer != name and all(scorer in scorers for scorers in others):
            found.append(Measure(AVERAGE, scorer, False, tuple((task, scorer) for task in by_task)))
    return found


def _answers(of_arm: Sequence[ArmRun], measure: Measure) -> list[Answers]:
    """By task of the measure and by seed, which questions were answered correctly."""
    return [
        {run.seed: [p.scorers[scorer].correct for p in _scores(run, task).predictions] for run in of_arm}
        for task, scorer in measure.parts
    ]


def _scores(run: ArmRun, task: str) -> Scores:
    return next(scores for scores in run.scores if scores.task == task)


def _check_questions(runs: Sequence[ArmRun]) -> None:
    """Answers are paired by their place.

    Raises: ValueError: two runs answer other questions, or in another order.
    """
    first = runs[0]
    for scores in first.scores:
        origins = [p.origin for p in scores.predictions]
        for run in runs:
            if [p.origin for p in _scores(run, scores.task).predictions] != origins:
                raise ValueError(f"{first} and {run} do not answer the same questions of {scores.task!r}")


def _compare(
    arms: Mapping[str, Sequence[ArmRun]], reference: str, measures: Sequence[Measure]
) -> dict[str, dict[Measure, dict[str, Any]]]:
    """Every arm minus the reference, corrected over all arms and tasks of a family."""
    _check_questions([run for of_arm in arms.values() for run in of_arm])
    found: dict[tuple[str, Measure], Difference] = {}
    for measure in measures:
        of_reference = _answers(arms[reference], measure)
        for name, of_arm in arms.items():
            if name != reference:
                found[name, measure] = difference(_answers(of_arm, measure), of_reference)
    corrected: dict[tuple[str, Measure], float] = {}
    for family in dict.fromkeys(measure.family for measure in measures):
        members = [key for key in found if key[1].family == family]
        p_values = holm([found[key].p_value for key in members])
        corrected |= dict(zip(members, p_values, strict=True))
    compared: dict[str, dict[Measure, dict[str, Any]]] = {name: {} for name in arms}
    for (name, measure), one in found.items():
        p_corrected = corrected[name, measure]
        compared[name][measure] = {
            "points": 100 * one.value,
            "stderr": 100 * one.stderr,
            "interval": [100 * one.low, 100 * one.high],
            "p_value": one.p_value,
            "p_corrected": p_corrected,
            "test": one.test,
            "seeds": one.seeds,
            "verdict": verdict(one, p_corrected),
        }
    return compared


def _results(
    of_arm: Sequence[ArmRun], measures: Sequence[Measure], compared: Mapping[Measure, Mapping[str, Any]]
) -> dict[str, Any]:
    """The scores of an arm by task and scorer; the figures of the headline scorer also above the others."""
    entries: dict[str, dict[str, Any]] = {}
    for measure in measures:
        answers = _answers(of_arm, measure)
        found = estimate(answers)
        by_seed = [averages.fmean(averages.fmean(of[seed]) for of in answers) for seed in sorted(answers[0])]
        figures: dict[str, Any] = {
            "score": found.value,
            "stderr": found.stderr,
            "interval": [found.low, found.high],
            "by_seed": by_seed,
        }
        if measure in compared:
            figures["difference"] = dict(compared[measure])
        entry = entries.setdefault(measure.task, {})
        if measure.headline:
            total = sum(len(next(iter(of.values()))) for of in answers)
            entry |= {"total": total, "scorer": measure.scorer, **figures, "scorers": {}}
        entry["scorers"][measure.scorer] = figures
    average = {AVERAGE: entries.pop(AVERAGE)} if len(measures[-1].parts) > 1 else {}
    return {"tasks": entries, **average}


def _costs(of_arm: Sequence[ArmRun]) -> dict[str, Any]:
    """What was trained, and what it cost; an arm without training has no costs."""
    config, manifest = of_arm[0].config, of_arm[0].manifest
    found: dict[str, Any] = {
        "seeds": sorted(run.seed for run in of_arm),
        "runs": [run.config.output.dir for run in of_arm],
    }
    steps = [m for run in of_arm for m in run.steps]
    if not steps:
        return found | {"trained": f"{config.model.quantization}, not trained"}
    tail = [m.loss for run in of_arm for m in run.steps[-max(1, len(run.steps) // 10) :]]
    trainable = int(manifest["trainable_parameters"])
    return found | {
        "trained": describe(config.model.quantization, config.adapter, config.training.mode),
        "trainable_parameters": trainable,
        "trainable_percent": 100 * trainable / (trainable + int(manifest["base"]["parameters"])),
        "final_loss": averages.fmean(tail),
        "seconds_per_step": averages.median(m.seconds for m in steps),
        "tokens_per_second": sum(m.tokens for m in steps) / sum(m.seconds for m in steps),
        "peak_memory_bytes": max(m.peak_memory_bytes for m in steps),
    }


def _published(
    percents: Mapping[str, Mapping[str, float]], source: str | None, results: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Published percents with those of the same arm and task here, where it was scored."""
    rows = []
    for arm, by_task in percents.items():
        for task, percent in by_task.items():
            entry = results[arm].get(AVERAGE) if task == AVERAGE else results[arm]["tasks"].get(task)
            ours = None if entry is None else 100 * entry["score"]
            minus = None if ours is None else ours - percent
            rows.append({"arm": arm, "task": task, "published": percent, "ours": ours, "difference": minus})
    return {"source": source, "scores": rows} if rows else {}


def _grid_point(point: GridPoint, at_edge: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    return {
        "arm": point.arm,
        "settings": dict(point.settings),
        "correct": point.correct,
        "total": point.total,
        "score": point.correct / point.total,
        "interval": list(wilson_interval(point.correct, point.total)),
        "chosen": point.chosen,
        "at_edge": list(at_edge.get(point.arm, ())) if point.chosen else [],
        "directory": point.directory,
    }


def _data(manifests: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """By arm, the numbers of examples, of training questions removed for being test questions, and so on."""
    fields = dict.fromkeys(field for of_arm in manifests.values() for field in of_arm)
    del fields["fingerprints"]
    return {name: {field: of_arm.get(field) for field in fields} for name, of_arm in manifests.items()}


def _disagreements(runs: Sequence[ArmRun], task: str) -> dict[str, Any]:
    """Where scorers disagree about an answer: how often each pair, and some questions without their text."""
    by_run = [(run, _scores(run, task)) for run in runs]
    names = _scorers(by_run[0][1])
    predictions = [p for _, scores in by_run for p in scores.predictions]
    counts = []
    for pair in combinations(names, 2):
        one_only, other_only = (
            sum(p.scorers[a].correct and not p.scorers[b].correct for p in predictions)
            for a, b in (pair, pair[::-1])
        )
        counts.append({"scorers": list(pair), "first_only": one_only, "second_only": other_only})
    first: dict[str, dict[str, Any]] = {}  # one answer a question, so that the list shows many questions
    for position in range(by_run[0][1].total):
        for run, scores in by_run:
            found = scores.predictions[position]
            if len({found.scorers[name].correct for name in names}) > 1 and len(first) < _LISTED:
                first.setdefault(found.origin, _disagreement(run, found, names))
    return {"answers": len(predictions), "counts": counts, "questions": list(first.values())}


def _disagreement(run: ArmRun, found: Prediction, names: Sequence[str]) -> dict[str, Any]:
    """The verdicts of a prediction; neither question nor output, which are other people's text."""
    verdicts = {
        name: {
            "extracted": _shortened(found.scorers[name].extracted),
            "gold": _shortened(found.scorers[name].gold),
            "correct": found.scorers[name].correct,
        }
        for name in names
    }
    # Of a path the file and its folder: a report may be read on another machine.
    origin = str(PurePath(*PurePath(found.origin).parts[-2:]))
    return {"origin": origin, "arm": run.arm, "seed": run.seed, "scorers": verdicts}


def _shortened(answer: str | None) -> str | None:
    return answer if answer is None or len(answer) <= _LONGEST_ANSWER else f"{answer[:_LONGEST_ANSWER]}…"


def _manifest(runs: Sequence[ArmRun]) -> dict[str, Any]:
    """The fields of the manifests: once where all runs agree, else by run."""
    flat = {f"{run.arm}-seed{run.seed}": dict(_fields(run.manifest)) for run in runs}
    first = next(iter(flat.values()))
    fields = list(dict.fromkeys(field for manifest in flat.values() for field in manifest))
    same = {f: first[f] for f in fields if all(m.get(f) == first.get(f) for m in flat.values())}
    return {
        "same": same,
        "by_run": {f: {name: m.get(f) for name, m in flat.items()} for f in fields if f not in same},
    }


def _fields(manifest: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    return ((key, value) for key, value in dotted(manifest).items() if key != "resumed")
