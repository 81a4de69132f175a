"""Plots of a run and of a comparison."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from qdora.files import write_file
from qdora.training.metrics import StepMetrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLORS = ("#1f6fb4", "#d1622b", "#2a8a4a", "#8456a8", "#b03060", "#1aa0a8", "#8c6d31", "#d873b8")
_GREY = "#8a8a8a"


def plot_loss(curves: Mapping[str, Sequence[StepMetrics]], path: Path, title: str) -> None:
    """Loss over steps, one line a run, the raw values faint behind their running mean.

    Args:
        curves: steps of each run, by name; none where nothing was trained.
        path: PNG to write.
        title: above the axes.
    """
    figure = Figure(figsize=(7, 4), dpi=130, layout="tight")
    axes = figure.subplots()
    draw_loss(axes, curves)
    axes.set_title(title, fontsize=11)
    write_file(path, lambda temporary: figure.savefig(temporary, format="png"))


def draw_loss(axes: Axes, curves: Mapping[str, Sequence[StepMetrics]]) -> None:
    """As `plot_loss`, into given axes."""
    for color, (name, steps) in zip(_colors(curves), curves.items(), strict=True):
        if not steps:  # of an arm that is not trained; its bar keeps its color
            continue
        x = [m.step for m in steps]
        y = [m.loss for m in steps]
        axes.plot(x, y, color=color, alpha=0.25, linewidth=1)
        axes.plot(x, running_mean(y, max(1, len(y) // 20)), color=color, linewidth=1.8, label=name)
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.set_ylabel("loss (nats per completion token)")
    axes.grid(alpha=0.25)
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(frameon=False)


def plot_comparison(
    curves: Mapping[str, Sequence[StepMetrics]],
    bases: Mapping[str, Mapping[str, Any]],
    scores: Mapping[str, Mapping[str, Any]],
    path: Path,
    title: str,
) -> None:
    """Loss curves beside exact match with its standard error.

    Args:
        curves: steps of each run, by name.
        bases: `score` (exact match) and `stderr`, as fractions, of models without an adapter.
        scores: of the arms.
        path: PNG to write.
        title: above both.
    """
    figure = Figure(figsize=(10, 4), dpi=130, layout="tight")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    draw_loss(left, curves)
    labels, bars = [*bases, *scores], [*bases.values(), *scores.values()]
    right.barh(
        range(len(bars)),
        [100 * bar["score"] for bar in bars],
        xerr=[100 * bar["stderr"] for bar in bars],
        color=[_GREY] * len(bases) + _colors(scores),
        capsize=4,
        height=0.55,
    )
    right.set_yticks(range(len(bars)), [textwrap.fill(label, 20, break_on_hyphens=False) for label in labels])
    right.invert_yaxis()
    right.set_xlabel("exact match (%), ± standard error")
    right.set_xlim(0, 100)
    right.grid(axis="x", alpha=0.25)
    figure.suptitle(textwrap.fill(title, 100), fontsize=11)
    write_file(path, lambda temporary: figure.savefig(temporary, format="png"))


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean of each value and up to `width` - 1 values before it."""
    return [sum(w) / len(w) for i in range(len(values)) if (w := values[max(0, i - width + 1) : i + 1])]


def _colors(names: Iterable[str]) -> list[str]:
    """One color an arm, the same in both panels and for all its seeds."""
    arms = [name.partition(" seed ")[0] for name in names]
    order = list(dict.fromkeys(arms))
    return [_COLORS[order.index(arm) % len(_COLORS)] for arm in arms]
