"""Plots of a run and of a comparison: PNG files, and SVG that stands in a page and takes on its colors."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from qdora.adapters.base import describe
from qdora.experiments.arms import AVERAGE, ArmRun
from qdora.files import write_file
from qdora.run import RunDirectory
from qdora.training.metrics import StepMetrics, read_metrics, read_validations

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLORS = ("#2f7fd0", "#e0713a", "#2f9e5b", "#9a6bd0", "#d0456e", "#1aa0a8", "#a8842c", "#d873b8")
_LINES = ("-", "--", ":")
_INK = "#1b1f24"
"""Of text and axes; a page puts its own color of text in its place."""
_ACCENT, _GREY = "#2f7fd0", "#8a9099"
_OF_VERDICT = {"higher": "#2f9e5b", "lower": "#d0456e", "no difference shown": _GREY}
_MOST_POINTS = 400
_MOST_INSIDE = 6
"""Entries of a legend, which would else hide the curves."""
_WIDTH = 4.6
"""Inches; at the width of a phone the text can still be read."""
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "qdora",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
    **dict.fromkeys(("text.color", "grid.color"), _INK),
    "grid.alpha": 0.15,
}


@dataclass(frozen=True)
class Interval:
    """One row of a plot of intervals, in percent or percentage points.

    Attributes:
        label: left of the row.
        value, low, high: dot and line.
        seeds: small dots.
        color: of all.
        filled: whether the dot is.
    """

    label: str
    value: float
    low: float
    high: float
    seeds: Sequence[float] = ()
    color: str = _ACCENT
    filled: bool = True


def plot_run(directory: RunDirectory) -> None:
    """Draw losses of training and validation, learning rate and gradient norm over the steps of a run.

    Raises: InputError: its configuration or metrics cannot be read, or the plot not written.
    """
    config, lines = directory.config(), directory.metrics_file
    steps, validations = read_metrics(lines), read_validations(lines)
    trained = describe(config.model.quantization, config.adapter, config.training.mode)
    with _figure(7, 6.4) as figure:
        upper, middle, lower = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1, 1))
        draw_loss(upper, {"training": steps})
        if validations:
            lowest = min(validations, key=lambda m: m.validation_loss)
            numbers = [m.step for m in validations]
            losses = [m.validation_loss for m in validations]
            upper.plot(numbers, losses, "o-", color=_COLORS[1], markersize=4, label="validation")
            named = f"lowest, after step {lowest.step}"
            upper.plot(
                lowest.step,
                lowest.validation_loss,
                "o",
                color=_COLORS[1],
                mfc="none",
                markersize=11,
                label=named,
            )
            upper.legend(frameon=False, fontsize=8)
        upper.set_title(f"{directory.path.name}: {trained}", fontsize=11)
        upper.set_xlabel("")
        numbers = [m.step for m in steps]
        middle.plot(numbers, [m.lr for m in steps], color=_COLORS[0], linewidth=1.4)
        middle.set_ylabel("learning rate")
        middle.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
        lower.plot(numbers, [m.grad_norm for m in steps], color=_COLORS[0], linewidth=1)
        lower.set_ylabel("gradient norm")
        lower.set_xlabel("optimizer step")
        for axes in (middle, lower):
            axes.set_ylim(bottom=0)
            axes.grid()
        figure.align_ylabels()
        _write_png(figure, directory.loss_plot)


def plot_comparison(runs: Sequence[ArmRun], report: Mapping[str, Any], path: Path) -> None:
    """Scores and paired differences of the first task, or of the mean over tasks, and the loss curves.

    Args:
        runs: the runs of the report.
        report: of `build_report`.
        path: PNG to write.
    """
    task = AVERAGE if AVERAGE in report["arms"][report["reference"]] else next(iter(report["tasks"]))
    curves = _curves(runs)
    rows = max(2.6, 0.9 + 0.32 * (len(report["arms"]) + len(report["bases"])))
    heights = (rows, 3.3 + _legend_height(curves)) if curves else (rows,)
    with _figure(10.8, sum(heights)) as figure:
        upper, *lower = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        left, right = upper.subplots(1, 2)
        draw_scores(left, report, task)
        draw_differences(right, report, task)
        left.set_title(_title(report, task), fontsize=11)
        if lower:
            draw_loss(lower[0].subplots(), curves, log=True)
        _write_png(figure, path)


def figures(runs: Sequence[ArmRun], report: Mapping[str, Any]) -> dict[str, str]:
    """Inline SVG: `scores/TASK` and `differences/TASK` for each task and the mean over tasks, and `loss`.

    Args:
        runs: the runs of the report; `loss` is left out where none was trained.
        report: of `build_report`.
    """
    found = {}
    of_reference = report["arms"][report["reference"]]
    for task in [*report["tasks"], *([AVERAGE] if AVERAGE in of_reference else [])]:
        rows = len(report["arms"]) + len(report["bases"])
        with _figure(_WIDTH, 0.65 + 0.27 * rows) as figure:
            draw_scores(figure.subplots(), report, task)
            found[f"scores/{task}"] = _svg(figure, f"scores of {task} with 95% intervals")
        with _figure(_WIDTH, 0.65 + 0.27 * rows) as figure:  # beside the other, row by row
            draw_differences(figure.subplots(), report, task)
            found[f"differences/{task}"] = _svg(figure, f"differences of {task} with 95% intervals")
    if curves := _curves(runs):
        with _figure(1.25 * _WIDTH, 3.3 + _legend_height(curves)) as figure:
            draw_loss(figure.subplots(), curves, log=True)
            found["loss"] = _svg(figure, "training loss over steps")
    return found


def draw_loss(axes: Axes, curves: Mapping[str, Sequence[StepMetrics]], *, log: bool = False) -> None:
    """Loss over steps, one line a run, the raw values faint behind their running mean.

    The seeds of an arm have one color and one entry of the legend.

    Args:
        curves: steps of each run, by name; none where nothing was trained.
        log: a logarithmic axis where the loss falls by a factor of 4 or more, so that ends are told apart.
    """
    order = list(dict.fromkeys(_arm(name) for name in curves))
    named: set[str] = set()
    for name, steps in curves.items():
        arm = _arm(name)
        number = order.index(arm)
        color, line = _COLORS[number % len(_COLORS)], _LINES[number // len(_COLORS) % len(_LINES)]
        label = arm if arm not in named else None
        named.add(arm)
        every = slice(None, None, max(1, len(steps) // _MOST_POINTS))
        x, y = [m.step for m in steps], [m.loss for m in steps]
        smooth = running_mean(y, max(1, len(y) // 20))
        if len(curves) <= 4:
            axes.plot(x[every], y[every], color=color, alpha=0.22, linewidth=1)
        axes.plot(x[every], smooth[every], line, color=color, linewidth=1.7, label=label)
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.set_ylabel("loss (nats per completion token)")
    losses = [m.loss for steps in curves.values() for m in steps]
    if log and 0 < 4 * min(losses) < max(losses):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid()
    if len(order) > _MOST_INSIDE:
        axes.legend(
            frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.16), borderpad=0
        )
    elif len(order) > 1:
        axes.legend(frameon=False, fontsize=8)


def draw_scores(axes: Axes, report: Mapping[str, Any], task: str) -> None:
    """Scores of bases and arms with 95% intervals, and each seed; a line at the reference's score."""
    rows = [_interval(name, _entry(of, task), _GREY) for name, of in report["bases"].items()]
    rows += [_interval(name, _entry(arm, task), _ACCENT) for name, arm in report["arms"].items()]
    axes.axvline(
        100 * _entry(report["arms"][report["reference"]], task)["score"], color=_INK, alpha=0.5, ls=":", lw=1
    )
    _draw_intervals(axes, rows)
    axes.set_xlabel(f"{report['metric']} (%), 95% interval")


def draw_differences(axes: Axes, report: Mapping[str, Any], task: str) -> None:
    """Every arm minus the reference in percentage points; what shows no difference is grey and hollow."""
    rows = []
    for name, arm in report["arms"].items():
        found = _entry(arm, task).get("difference")
        if found is None:
            rows.append(Interval(name, 0, 0, 0, color=_INK))
            continue
        low, high = found["interval"]
        color, shown = _OF_VERDICT[found["verdict"]], found["verdict"] != "no difference shown"
        rows.append(Interval(name, found["points"], low, high, color=color, filled=shown))
    axes.axvline(0, color=_INK, linewidth=1)
    _draw_intervals(axes, rows, above=len(report["bases"]))
    axes.set_xlabel(f"minus {_shortened(report['reference'])} (points), 95% interval")


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean of each value and up to `width` - 1 values before it."""
    return [sum(w) / len(w) for i in range(len(values)) if (w := values[max(0, i - width + 1) : i + 1])]


def _draw_intervals(axes: Axes, rows: Sequence[Interval], above: int = 0) -> None:
    """Draw rows from the top, below some empty ones."""
    for place, row in enumerate(rows):
        axes.plot([row.low, row.high], [place, place], color=row.color, linewidth=2, solid_capstyle="round")
        face = row.color if row.filled else "none"
        axes.plot(row.value, place, "o", markersize=7, color=row.color, markerfacecolor=face)
        if len(row.seeds) > 1:
            axes.plot(row.seeds, [place + 0.28] * len(row.seeds), "|", markersize=6, color=row.color)
    axes.set_yticks(range(len(rows)), [_shortened(row.label) for row in rows])
    axes.set_ylim(len(rows) - 0.4, -above - 0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.margins(x=0.08)
    axes.grid(axis="x")


def _interval(name: str, entry: Mapping[str, Any], color: str) -> Interval:
    low, high = entry["interval"]
    seeds = [100 * score for score in entry["by_seed"]]
    return Interval(name, 100 * entry["score"], 100 * low, 100 * high, seeds, color)


def _entry(of_arm: Mapping[str, Any], task: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = of_arm[AVERAGE] if task == AVERAGE else of_arm["tasks"][task]
    return found


def _title(report: Mapping[str, Any], task: str) -> str:
    of = f"mean of {len(report['tasks'])} tasks" if task == AVERAGE else task
    return f"{report['title']}: {of}"


def _shortened(label: str) -> str:
    return textwrap.fill(label, 24, break_on_hyphens=False, max_lines=2, placeholder=" …")


def _curves(runs: Sequence[ArmRun]) -> dict[str, Sequence[StepMetrics]]:
    return {f"{run.arm} seed {run.seed}": run.steps for run in runs if run.steps}


def _legend_height(curves: Mapping[str, Sequence[StepMetrics]]) -> float:
    """Inches below the axes."""
    arms = len({_arm(name) for name in curves})
    return 0.0 if arms <= _MOST_INSIDE else 0.2 * -(-arms // 3)


def _arm(name: str) -> str:
    return name.partition(" seed ")[0]


@contextmanager
def _figure(width: float, height: float) -> Iterator[Figure]:
    """A figure in the style of the reports, which also holds while it is drawn and saved; inches."""
    with rc_context(_STYLE):
        yield Figure(figsize=(width, height), dpi=130, layout="constrained")


def _write_png(figure: Figure, path: Path) -> None:
    write_file(path, lambda temporary: figure.savefig(temporary, format="png"))


def _svg(figure: Figure, label: str) -> str:
    """An element that scales to the width of its place and has the text color of the page."""
    buffer = StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None
    name = re.sub(r"\W+", "-", label)  # ids are of the page, in which there are several figures
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    opening = f'<svg {box.group()} role="img" aria-label="{escape(label)}">'
    text = re.sub(r"<svg[^>]*>", lambda _: opening, text, count=1)
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, count=1, flags=re.DOTALL)
    return text.replace(_INK, "currentColor").replace("'DejaVu Sans'", "system-ui")
