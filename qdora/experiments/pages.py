"""The report of a comparison as an HTML page, as Markdown, and as tables of comma-separated values."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from io import StringIO
from typing import Any

from tabulate import tabulate

from qdora.evaluation.scores import wilson_interval
from qdora.experiments.arms import AVERAGE, OF_TRAINING, ArmRun, covers
from qdora.experiments.grid import condensed

_SHOWN = {
    "base.fingerprint": "base",
    "base.parameters": "{:,} frozen parameters",
    "data.train": "{:,} training examples",
    "batch_order": "order of the batches",
    "steps": "{:,} steps",
    "initial_a": "initial A",
}
"""Conditions that the page names where all arms agree on them."""

_SIGNS = {"higher": "▲", "lower": "▼", "no difference shown": "○"}
"""In tables, beside a difference."""

METHOD = (
    "Scores have 95% Wilson intervals, with several seeds at the effective number of questions. Differences "
    "are paired: both arms answered the same questions. With one seed and one task p is that of McNemar's "
    "exact test, else of a bootstrap over seeds and questions (10,000 resamples), as are the intervals of "
    "differences and means. p is corrected by Holm's method over all arms and tasks of a scorer's table. No "
    "difference is shown where the corrected p is 0.05 or more, or the interval holds 0: that is not a proof "
    "that there is none."
)


def html(report: Mapping[str, Any], figures: Mapping[str, str]) -> str:
    """One page without scripts or external resources.

    Args:
        report: of `build_report`.
        figures: inline SVG by name, of `plots.figures`.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("qdora.experiments"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": lambda fraction: f"{100 * fraction:.1f}",
        "percents": _percents,
        "signed": lambda points: f"{points:+.1f}".replace("-", "−"),
        "p": _p_value,
        "value": _text,
        "thousands": lambda number: f"{number:,.0f}",
        "gib": lambda count: f"{count / 2**30:.2f}",
    }
    found = findings(report)
    verdicts = [rows for one in found for rows in one["by_verdict"].values()]
    return environment.get_template("report.html.j2").render(
        report=report,
        figures={name: Markup(svg) for name, svg in figures.items()},
        columns=columns(report),
        findings=found,
        settings=_settings(report),
        shown=sum(len(rows) for rows in verdicts if rows[0]["verdict"] != "no difference shown"),
        tests=sum(map(len, verdicts)),
        same=_same(report),
        signs=_SIGNS,
        method=METHOD,
    )


def columns(report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The entries of all arms by task, the mean over tasks first.

    Returns: by task `title`, `total`, `scorers` (the headline scorer first), `bases` and `arms` by name.
    """
    found = {}
    reference = report["arms"][report["reference"]]
    tasks = list(report["tasks"])
    for task in [*([AVERAGE] if AVERAGE in reference else []), *tasks]:
        mean = task not in tasks
        of = {
            kind: {name: one[AVERAGE] if mean else one["tasks"][task] for name, one in report[kind].items()}
            for kind in ("bases", "arms")
        }
        entry = of["arms"][report["reference"]]
        found[task] = {
            "title": f"Mean of {len(tasks)} tasks" if mean else task,
            "total": entry["total"],
            "scorers": list(entry["scorers"]),
            **of,
        }
    return found


def findings(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of every arm but the reference, by verdict, its headline differences: task and figures."""
    found = []
    for name in report["arms"]:
        if name == report["reference"]:
            continue
        of_arm: dict[str, list[dict[str, Any]]] = {verdict: [] for verdict in _SIGNS}
        for column in columns(report).values():
            delta = column["arms"][name]["difference"]
            of_arm[delta["verdict"]].append({"task": column["title"], **delta})
        found.append({"arm": name, "by_verdict": {verdict: rows for verdict, rows in of_arm.items() if rows}})
    return found


def markdown(report: Mapping[str, Any]) -> str:
    """The report as Markdown: settings, findings, a table for each task, costs, grids, data."""
    arms = report["arms"]
    same = f"The same in all arms: {', '.join(_same(report))}. " if _same(report) else ""
    seeds = ", ".join(map(str, report["seeds"]))
    lines = [f"# {report['title']}", "", f"{same}Seeds: {seeds}. Reference: {report['reference']}.", ""]
    rows = [["trained", *(arm["trained"] for arm in arms.values())]]
    rows += [[key, *values.values()] for key, values in _settings(report).items()]
    lines += [_table(rows, ["", *arms]), "", "## Differences from the reference", ""]
    for one in findings(report):
        parts = []
        for verdict, differences in one["by_verdict"].items():
            named = [f"{d['task']} ({_delta(d)}, p {_p_value(d['p_corrected'])})" for d in differences]
            parts.append(f"{verdict}: {', '.join(named)}")
        lines.append(f"- **{one['arm']}**: {'; '.join(parts)}")
    for column in columns(report).values():
        lines += ["", f"## {column['title']}, {column['total']:,} questions", ""]
        lines += [_task_table(report, column)]
    lines += ["", METHOD, "", "![scores, differences and loss](comparison.png)"]
    costs = [
        [
            name,
            arm["trained"],
            f"{arm['trainable_parameters']:,}",
            f"{arm['trainable_percent']:.3f}",
            f"{arm['final_loss']:.4f}",
            f"{arm['seconds_per_step']:.2f}",
            f"{arm['tokens_per_second']:,.0f}",
            f"{arm['peak_memory_bytes'] / 2**30:.2f}",
        ]
        for name, arm in arms.items()
        if "final_loss" in arm
    ]
    if costs:
        headers = ["arm", "trained", "parameters", "% of all", "final loss", "s/step", "tokens/s", "peak GiB"]
        lines += ["", "## Cost", "", _table(costs, headers)]
        shared = report["manifest"]["by_run"].get("trained_in", {})
        lines += [f"\n{run} was trained once, as {other}." for run, other in shared.items() if other]
    if published := report["published"]:
        rows = [
            [one["arm"], one["task"], f"{one['published']:.1f}", _or_none(one["ours"]), _signed(one)]
            for one in published["scores"]
        ]
        headers = ["arm", "task", "published %", "here %", "here minus published"]
        lines += [
            "",
            "## Published figures",
            "",
            f"Source: {published['source']}.",
            "",
            _table(rows, headers),
        ]
    if report["grid"]:
        rows = [
            [
                point["arm"],
                ", ".join(f"{key} {_text(value)}" for key, value in point["settings"].items()),
                _percents(point),
                ", ".join(["chosen", *(f"{key} at the edge" for key in point["at_edge"])])
                if point["chosen"]
                else "",
            ]
            for point in report["grid"]
        ]
        headers = ["arm", "settings", f"validation {report['metric']} % [95%]", ""]
        lines += ["", "## Grids", "", _table(rows, headers)]
        if any(point["at_edge"] for point in report["grid"]):
            lines += [
                "",
                "At the edge: the smallest or largest value was chosen, and a better one may lie beyond.",
            ]
    rows = [[name, *map(_or_none, of.values())] for name, of in report["data"].items()]
    fields = next(iter(report["data"].values()))
    headers = ["arm", *(field.replace("_", " ") for field in fields)]
    lines += ["", "## Data", "", _table(rows, headers)]
    rows = [
        [task, *count["scorers"], str(count["first_only"]), str(count["second_only"]), str(of["answers"])]
        for task, of in report["disagreements"].items()
        for count in of["counts"]
    ]
    if rows:
        headers = [
            "task",
            "scorer",
            "other scorer",
            "right by the first only",
            "by the other only",
            "answers",
        ]
        lines += ["", "## Scorers that disagree", "", _table(rows, headers)]
    lines += ["", "## Made by", ""]
    lines += [f"- {key}: {_text(value)}" for key, value in report["manifest"]["same"].items()]
    return "\n".join([*lines, ""])


def _task_table(report: Mapping[str, Any], column: Mapping[str, Any]) -> str:
    """Bases and arms; the headline scorer with its difference, then the others."""
    first, *others = column["scorers"]
    labelled = [(f"{name}, no adapter", entry) for name, entry in column["bases"].items()]
    rows = []
    for label, entry in [*labelled, *column["arms"].items()]:
        delta = entry.get("difference")
        rows.append(
            [
                label,
                _percents(entry),
                "" if delta is None else _delta(delta),
                "" if delta is None else _p_value(delta["p_corrected"]),
                "" if delta is None else delta["verdict"],
                *(_other(entry["scorers"][scorer]) for scorer in others),
            ]
        )
    minus = f"minus {report['reference']}, points [95%]"
    return _table(rows, ["arm", f"{first} % [95%]", minus, "p (Holm)", "", *(f"{o} %" for o in others)])


def _other(figures: Mapping[str, Any]) -> str:
    """A score by another scorer than that of the headline, with its difference and what that shows."""
    delta = figures.get("difference")
    shown = "" if delta is None else f" ({delta['points']:+.1f} {_SIGNS[delta['verdict']]})"
    return f"{100 * figures['score']:.1f}{shown}"


def tables(report: Mapping[str, Any]) -> dict[str, str]:
    """scores.csv, a row for each arm, seed, task and scorer, and differences.csv, a row for each test."""
    scores: list[dict[str, Any]] = []
    differences: list[dict[str, Any]] = []
    for task, column in columns(report).items():
        of_bases = [(name, entry, [""]) for name, entry in column["bases"].items()]
        of_arms = [(name, entry, report["arms"][name]["seeds"]) for name, entry in column["arms"].items()]
        for name, entry, seeds in of_bases + of_arms:
            for scorer, figures in entry["scorers"].items():
                key = {"arm": name, "task": task, "scorer": scorer, "headline": scorer == entry["scorer"]}
                if delta := figures.get("difference"):
                    differences.append(_difference_row(report, key, delta, column["total"]))
                if task not in report["tasks"]:
                    continue
                for seed, score in zip(seeds, figures["by_seed"], strict=True):
                    correct = round(score * column["total"])
                    low, high = wilson_interval(correct, column["total"])
                    counts = {"correct": correct, "total": column["total"], "score": score}
                    scores.append({**key, "seed": seed, **counts, "low": low, "high": high})
    return {"scores.csv": _csv(scores), "differences.csv": _csv(differences)}


def answers_table(runs: Sequence[ArmRun]) -> str:
    """answers.csv: a row for each task, question and scorer, a column for each run, 1 where it is right."""
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for run in runs:
        for scores in run.scores:
            for prediction in scores.predictions:
                for scorer, found in prediction.scorers.items():
                    key = (scores.task, prediction.origin, scorer)
                    row = rows.setdefault(key, dict(zip(("task", "question", "scorer"), key, strict=True)))
                    row[f"{run.arm}-seed{run.seed}" if run.train else run.arm] = int(found.correct)
    return _csv(list(rows.values()))


def _difference_row(
    report: Mapping[str, Any], key: Mapping[str, Any], delta: Mapping[str, Any], total: int
) -> dict[str, Any]:
    low, high = delta["interval"]
    figures = {"points": delta["points"], "low": low, "high": high, "stderr": delta["stderr"]}
    tests = {name: delta[name] for name in ("p_value", "p_corrected", "test", "seeds", "verdict")}
    return {**key, "reference": report["reference"], "questions": total, **figures, **tests}


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    out = StringIO()
    writer = csv.DictWriter(out, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _same(report: Mapping[str, Any]) -> list[str]:
    """What all arms share, of the conditions that a reader looks for."""
    conditions = report["conditions"]
    return [text.format(conditions[key]) for key, text in _SHOWN.items() if conditions.get(key) is not None]


def _settings(report: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """The settings in which arms differ, by key and arm; none of training where nothing is trained."""
    rows = {
        key: [
            "" if covers(OF_TRAINING, key) and "final_loss" not in report["arms"][name] else _text(value)
            for name, value in values.items()
        ]
        for key, values in report["differences"].items()
    }
    return {key: dict(zip(report["arms"], values, strict=True)) for key, values in condensed(rows).items()}


def _percents(entry: Mapping[str, Any]) -> str:
    low, high = entry["interval"]
    return f"{100 * entry['score']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _delta(delta: Mapping[str, Any]) -> str:
    low, high = delta["interval"]
    return f"{delta['points']:+.1f} [{low:+.1f}, {high:+.1f}]"


def _p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _or_none(value: Any) -> str:
    return "" if value is None else f"{value:.1f}" if isinstance(value, float) else f"{value:,}"


def _signed(one: Mapping[str, Any]) -> str:
    return "" if one["difference"] is None else f"{one['difference']:+.1f}"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _table(rows: Sequence[Sequence[str]], headers: Sequence[str]) -> str:
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)
