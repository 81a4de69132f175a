"""Figures of the analyses."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from qdora.analysis.decomposition import ALL, Change, Fit
from qdora.analysis.spectra import Kind, Spectrum
from qdora.files import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLORS = ("#1f6fb4", "#d1622b", "#2a8a4a", "#8456a8", "#b03060", "#1aa0a8", "#8c6d31", "#d873b8")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_GREY = "#8a8a8a"
_WIDE = 30
"""Runs that differ by more than this factor are drawn on a logarithmic axis."""
_TITLES: Mapping[Kind, str] = {
    "base": "base weight W",
    "change": "change ΔW",
    "update": "low-rank update s ∘ c B A",
}


def _save(figure: Figure, path: Path) -> None:
    write_file(path, lambda temporary: figure.savefig(temporary, format="png"))


def plot_scatter(found: Sequence[Change], fits: Sequence[Fit], module: str, path: Path) -> None:
    """ΔM against ΔD of one module, a panel a run, with the line over all points (DoRA, Figures 2 and 7).

    Args:
        found: of all runs and modules.
        fits: of the same.
        module: `q_proj` for Figure 2, `v_proj` for Figure 7.
        path: PNG to write.
    """
    own = [change for change in found if change.module == module]
    runs = list(dict.fromkeys(change.run for change in own))
    columns = min(3, len(runs))
    rows = -(-len(runs) // columns)
    figure = Figure(figsize=(1.2 + 4.2 * columns, 0.7 + 3.6 * rows), dpi=130, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    layers = [change.index or 0 for change in own]
    shades = {"cmap": "viridis", "vmin": min(layers), "vmax": max(max(layers), min(layers) + 1)}
    drawn = None
    for axes, run in zip(panels, runs, strict=False):
        of_run = [change for change in own if change.run == run]
        steps, handles = sorted({change.step for change in of_run}), []
        for step, marker in zip(steps, _markers(len(steps)), strict=True):
            points = [change for change in of_run if change.step == step]
            label = f"step {step} (final)" if points[0].final else f"step {step}"
            # In grey: a color is a layer's.
            handles.append(
                Line2D([], [], color=_GREY, marker=marker, linestyle="", markersize=5, label=label)
            )
            drawn = axes.scatter(
                [change.delta_d for change in points],
                [change.delta_m for change in points],
                c=[change.index or 0 for change in points],
                marker=marker,
                s=26,
                linewidths=0,
                **shades,
            )
        fit = next(f for f in fits if (f.run, f.module, f.step) == (run, module, ALL))
        _draw_line(axes, fit, [change.delta_d for change in of_run])
        axes.set_title(f"{run} ({of_run[0].method})\n{_said(fit)}", fontsize=9, pad=14)
        axes.set_xlabel("ΔD")
        axes.set_ylabel("ΔM")
        axes.ticklabel_format(style="sci", scilimits=(-3, 3))
        axes.grid(alpha=0.25)
        axes.legend(handles=handles, frameon=False, fontsize=7)
    for axes in panels[len(runs) :]:
        axes.set_axis_off()
    if drawn is not None:
        bar = figure.colorbar(drawn, ax=list(panels), label="decoder layer", shrink=0.8)
        bar.ax.yaxis.set_major_locator(MaxNLocator("auto", integer=True))
    figure.suptitle(f"Magnitude and direction updates, {module}", fontsize=11)
    _save(figure, path)


def _markers(count: int) -> list[str]:
    return [_MARKERS[i % len(_MARKERS)] for i in range(count)]


def _draw_line(axes: Axes, fit: Fit, x: Sequence[float]) -> None:
    if fit.slope is None or fit.intercept is None:
        return
    ends = np.array([min(x), max(x)])
    axes.plot(ends, fit.intercept + fit.slope * ends, color=_GREY, linewidth=1.2, zorder=0)


def _said(fit: Fit) -> str:
    if fit.slope is None or fit.correlation is None:
        return f"{fit.points} points: no line"
    return (
        f"r = {fit.correlation:.2f} [{fit.correlation_low:.2f}, {fit.correlation_high:.2f}], "
        f"slope {fit.slope:.3g} [{fit.slope_low:.3g}, {fit.slope_high:.3g}]"
    )


def plot_layers(found: Sequence[Change], modules: Sequence[str], path: Path, title: str) -> None:
    """ΔM and ΔD over the decoder's layers at the last step, a line a run (DoRA, Figures 3 and 8).

    Args:
        found: of all runs, modules and steps.
        modules: a row each: `q_proj` for Figure 3, with `k_proj` and `v_proj` for Figure 8.
        path: PNG to write.
        title: above the panels.
    """
    figure = Figure(figsize=(10, 0.8 + 2.5 * len(modules)), dpi=130, layout="constrained")
    panels = figure.subplots(len(modules), 2, squeeze=False)
    runs = list(dict.fromkeys(change.run for change in found))
    last = {run: max(change.step for change in found if change.run == run) for run in runs}
    for (left, right), module in zip(panels, modules, strict=True):
        for i, run in enumerate(runs):
            own = [c for c in found if (c.run, c.module, c.step) == (run, module, last[run])]
            own = sorted((c for c in own if c.index is not None), key=lambda c: c.index or 0)
            for axes, values in ((left, [c.delta_m for c in own]), (right, [c.delta_d for c in own])):
                color, marker = _COLORS[i % len(_COLORS)], _MARKERS[i % len(_MARKERS)]
                axes.plot(
                    [c.index for c in own], values, color=color, marker=marker, markersize=3.5, label=run
                )
        for axes, name in ((left, "ΔM"), (right, "ΔD")):
            heights = [height for line in axes.get_lines() for height in line.get_ydata() if height > 0]
            wide = bool(heights) and max(heights) > _WIDE * min(heights)
            axes.set_yscale("log" if wide else "linear")
            axes.set_title(f"{module}: {name}", fontsize=9)
            axes.set_ylabel(name)
            axes.set_xlabel("decoder layer")
            axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
            if not wide:
                axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))
                axes.set_ylim(bottom=0)
            axes.grid(alpha=0.25)
    panels[0, 0].legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=11)
    _save(figure, path)


def plot_spectra(spectra: Sequence[Spectrum], path: Path, title: str) -> None:
    """Singular values and effective ranks, a row of panels a kind of matrix.

    Left σ_k / σ_1, the median over layers with the range from the least to the largest, a line a module;
    right the effective rank over the decoder's layers.
    """
    kinds = list(dict.fromkeys(spectrum.kind for spectrum in spectra))
    modules = list(dict.fromkeys(spectrum.module for spectrum in spectra))
    figure = Figure(figsize=(11, 0.8 + 3.3 * len(kinds)), dpi=130, layout="constrained")
    panels = figure.subplots(len(kinds), 2, squeeze=False)
    for (left, right), kind in zip(panels, kinds, strict=True):
        for i, module in enumerate(modules):
            own = [s for s in spectra if s.kind == kind and s.module == module and s.values[0] > 0]
            if not own:
                continue
            color = _COLORS[i % len(_COLORS)]
            length = min(len(s.values) for s in own)
            ratios = np.array([[value / s.values[0] for value in s.values[:length]] for s in own])
            positions = range(1, length + 1)
            left.plot(positions, np.median(ratios, axis=0), color=color, linewidth=1.5, label=module)
            left.fill_between(positions, ratios.min(axis=0), ratios.max(axis=0), color=color, alpha=0.1, lw=0)
            of_decoder = sorted((s for s in own if s.index is not None), key=lambda s: s.index or 0)
            ranks = [s.effective_rank for s in of_decoder]
            right.plot([s.index for s in of_decoder], ranks, color=color, marker="o", ms=3, label=module)
        left.set_title(f"{_TITLES[kind]}: singular values, median and range over layers", fontsize=9)
        left.set_xlabel("k")
        left.set_ylabel("σₖ / σ₁")
        left.set_ylim(0, 1.02)
        right.set_title(f"{_TITLES[kind]}: effective rank", fontsize=9)
        right.set_xlabel("decoder layer")
        right.set_ylabel("exp entropy of σ / Σσ")
        right.set_ylim(bottom=0)
        for axes in (left, right):
            axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
            axes.grid(alpha=0.25)
    panels[0, 0].legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=11)
    _save(figure, path)


def plot_ranks(
    ranks: Mapping[str, tuple[str, int | None, int]], constant: int, path: Path, title: str
) -> None:
    """Ranks over the decoder's layers, a row a module, the rank written into each cell.

    Args:
        ranks: module, number of the decoder layer and rank, by full name; layers outside of one are left out.
        constant: the rank that is drawn neutral.
        path: PNG to write.
        title: above the panel.
    """
    inside = [(m, index, rank) for m, index, rank in ranks.values() if index is not None]
    if not inside:
        return
    modules = list(dict.fromkeys(module for module, _, _ in inside))
    width = 1 + max(index for _, index, _ in inside)
    grid = np.full((len(modules), width), np.nan)
    for module, index, rank in inside:
        grid[modules.index(module), index] = rank
    figure = Figure(
        figsize=(max(7, 2 + 0.34 * width), 1.4 + 0.36 * len(modules)), dpi=130, layout="constrained"
    )
    axes = figure.subplots()
    ratios = np.log2(grid / constant)
    reach = np.nanmax(np.abs(ratios)) or 1.0
    image = axes.imshow(ratios, cmap="RdBu_r", vmin=-reach, vmax=reach, aspect="auto")
    for row, column in zip(*np.nonzero(~np.isnan(grid)), strict=True):
        color = "white" if abs(ratios[row, column]) > 0.6 * reach else "black"
        text = f"{int(grid[row, column])}"
        axes.text(column, row, text, ha="center", va="center", fontsize=6.5, color=color)
    axes.set_yticks(range(len(modules)), modules, fontsize=8)
    axes.set_xlabel("decoder layer")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    figure.colorbar(image, ax=axes, label=f"log₂ of rank / {constant}")
    figure.suptitle(textwrap.fill(title, 90), fontsize=9)
    _save(figure, path)
