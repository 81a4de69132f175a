"""How much magnitude and direction of each weight change in training (DoRA, arXiv:2402.09353 §3.2, Eqs. 2-4).

The paper's column of a d × k matrix is a row of ours, which is (out, in).

O out_features   I in_features
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from qdora.analysis.trained import SavedStep, TrainedModel
from qdora.quant.base import rows_per_tile

ALL = "all"
"""Modules or steps taken together."""
CONFIDENCE = 0.95
_FEWEST_POINTS = 4
"""Fisher's interval of a correlation needs one point more than three."""


@dataclass(frozen=True)
class Change:
    """One layer at one step of a run.

    Attributes:
        run: name of the run.
        method: what it trained, by its axes.
        step: optimizer steps done.
        final: whether the run ended there.
        layer: full name.
        index: number of the decoder layer, from 0; None outside of one.
        module: last part of the name.
        delta_m: mean over rows of | ||w'|| - ||w|| |.
        delta_d: mean over rows of 1 - cos(w', w).
    """

    run: str
    method: str
    step: int
    final: bool
    layer: str
    index: int | None
    module: str
    delta_m: float
    delta_d: float


@dataclass(frozen=True)
class Fit:
    """ΔM against ΔD over the layers of a run: correlation and straight line, each with its 95% interval.

    Figures are None of fewer than four points, and where all ΔD or all ΔM are equal.

    Attributes:
        module: of the layers; `all` for every module.
        step: of the points; `all` for every checkpoint together, as in the paper's Figures 2 and 7.
        points: how many.
        correlation: Pearson's r, its interval by Fisher's transformation.
        slope, intercept: of least squares, ΔM = slope ΔD + intercept; the interval by Student's t.
    """

    run: str
    method: str
    module: str
    step: str
    points: int
    correlation: float | None = None
    correlation_low: float | None = None
    correlation_high: float | None = None
    slope: float | None = None
    slope_low: float | None = None
    slope_high: float | None = None
    intercept: float | None = None


def weight_change(before_OI: torch.Tensor, after_OI: torch.Tensor) -> tuple[float, float]:
    """ΔM and ΔD of one weight.

    ΔM = mean over rows | ||w'|| - ||w|| |,   ΔD = mean over rows 1 - cos(w', w)

    In float64: of a short training 1 - cos is far below what float32 resolves.  A row that is zero before and
    after, as padded vocabularies have, has not turned; one that becomes or was zero has no direction, cos 0.

    Source: DoRA, arXiv:2402.09353 Eqs. 3 and 4.
    """
    rows, width = before_OI.shape
    step = rows_per_tile(rows, width, torch.float64, before_OI.device)
    delta_m = delta_d = 0.0
    for start in range(0, rows, step):
        w_RI, trained_RI = (w_OI[start : start + step].double() for w_OI in (before_OI, after_OI))
        m_R = torch.linalg.vector_norm(w_RI, dim=1)
        trained_m_R = torch.linalg.vector_norm(trained_RI, dim=1)
        smallest = torch.finfo(torch.float64).tiny
        cosine_R = torch.linalg.vecdot(w_RI, trained_RI) / (m_R * trained_m_R).clamp_min(smallest)
        cosine_R[(m_R == 0) & (trained_m_R == 0)] = 1
        delta_m += float((trained_m_R - m_R).abs().sum())
        delta_d += float((1 - cosine_R).sum())
    return delta_m / rows, delta_d / rows


def changes(run: str, method: str, model: TrainedModel, saved: SavedStep) -> Iterator[Change]:
    """ΔM and ΔD of every trained layer at one step, two dense matrices at a time.

    Args:
        run, method: names for what is found.
        model: the base that was trained on.
    Raises: InputError: as `TrainedModel.layers`.
    """
    for layer in model.layers(saved.adapter):
        delta_m, delta_d = weight_change(layer.before(), layer.after())
        place = (layer.name, layer.index, layer.module)
        yield Change(run, method, saved.step, saved.final, *place, delta_m, delta_d)


def fits(found: Sequence[Change]) -> list[Fit]:
    """Correlation and line for each run, by module and of all modules, over all steps and for each one.

    Over all steps both quantities grow from zero, which alone makes them correlate: those of a single step,
    over layers, are free of that.
    """
    result = []
    for run in dict.fromkeys(change.run for change in found):
        own = [change for change in found if change.run == run]
        steps = sorted({change.step for change in own})
        for module in (ALL, *dict.fromkeys(change.module for change in own)):
            of_module = [change for change in own if module in (ALL, change.module)]
            result.append(_fit(of_module, module, ALL))
            for step in steps if len(steps) > 1 else ():
                result.append(_fit([c for c in of_module if c.step == step], module, str(step)))
    return result


def _fit(found: Sequence[Change], module: str, step: str) -> Fit:
    from scipy import stats  # half a second

    run, method = found[0].run, found[0].method
    x, y = [change.delta_d for change in found], [change.delta_m for change in found]
    if len(found) < _FEWEST_POINTS or min(x) == max(x) or min(y) == max(y):
        return Fit(run, method, module, step, len(found))
    correlation = stats.pearsonr(x, y)
    interval = correlation.confidence_interval(CONFIDENCE)
    line = stats.linregress(x, y)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(found) - 2)) * float(line.stderr)
    return Fit(
        run=run,
        method=method,
        module=module,
        step=step,
        points=len(found),
        correlation=float(correlation.statistic),
        correlation_low=float(interval.low),
        correlation_high=float(interval.high),
        slope=float(line.slope),
        slope_low=float(line.slope) - half,
        slope_high=float(line.slope) + half,
        intercept=float(line.intercept),
    )
