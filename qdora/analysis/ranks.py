"""Ranks for each layer under a budget of parameters, and the configuration keys that say them."""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import yaml

from qdora.analysis.spectra import Spectrum
from qdora.config import AdapterConfig
from qdora.errors import InputError

RANKS, ALPHAS = "adapter.rank_pattern", "adapter.alpha_pattern"


@dataclass(frozen=True)
class Plan:
    """Ranks of all layers.

    Attributes:
        ranks: by full name.
        parameters: of A and B together, Σ r (in + out).
        budget: most parameters allowed.
        constant: the rank that every layer would have otherwise, at most its smaller side.
        constant_parameters: those of that.
        gain, constant_gain: what these ranks, and the constant one, capture, as a fraction of all gains.
    """

    ranks: dict[str, int]
    parameters: int
    budget: int
    constant: int
    constant_parameters: int
    gain: float
    constant_gain: float


def allocate(gains: Mapping[str, Sequence[float]], costs: Mapping[str, int], budget: int) -> dict[str, int]:
    """Ranks with Σ rank cost <= budget, one at least everywhere, that capture much of the gains.

    Greedy: the next rank goes where it gains most per parameter, and a layer whose next rank no longer fits
    gets none.  Gains fall within a layer, so no ranks of as many parameters gain more, as long as every rank
    that was tried fitted.

    Args:
        gains: what the first, second, ... rank of each layer adds, not increasing; no layer gets more.
        costs: parameters of one rank of each layer, in + out.
        budget: of parameters.
    Raises: InputError: rank 1 everywhere takes more; the least budget is named.
    """
    least = sum(costs[name] for name in gains)
    if budget < least:
        raise InputError(f"--budget {budget}: rank 1 in each of {len(gains)} layers takes {least} parameters")
    ranks, left = dict.fromkeys(gains, 1), budget - least
    # Ties go to the layer that comes first.
    order = {name: i for i, name in enumerate(gains)}
    waiting = [(-values[1] / costs[name], order[name], name) for name, values in gains.items() if values[1:]]
    heapq.heapify(waiting)
    while waiting:
        density, place, name = heapq.heappop(waiting)
        if density >= 0 or costs[name] > left:
            continue
        ranks[name] += 1
        left -= costs[name]
        if ranks[name] < len(gains[name]):
            following = -gains[name][ranks[name]] / costs[name]
            heapq.heappush(waiting, (following, place, name))
    return ranks


def plan(
    gains: Mapping[str, Sequence[float]],
    shapes: Mapping[str, tuple[int, int]],
    budget: int | None,
    constant: int,
) -> Plan:
    """Allocate, and compare with one rank for all layers.

    Args:
        gains: as of `allocate`.
        shapes: (out, in) of each layer.
        budget: of parameters; those of the constant rank where None.
        constant: that rank.
    Raises: InputError: as `allocate`.
    """
    costs = {name: sum(shapes[name]) for name in gains}
    same = {name: min(constant, *shapes[name]) for name in gains}
    constant_parameters = sum(rank * costs[name] for name, rank in same.items())
    budget = constant_parameters if budget is None else budget
    ranks = allocate(gains, costs, budget)
    total = sum(map(sum, gains.values())) or 1.0

    def captured(of: Mapping[str, int]) -> float:
        return sum(sum(gains[name][:rank]) for name, rank in of.items()) / total

    return Plan(
        ranks=ranks,
        parameters=sum(rank * costs[name] for name, rank in ranks.items()),
        budget=budget,
        constant=constant,
        constant_parameters=constant_parameters,
        gain=captured(ranks),
        constant_gain=captured(same),
    )


def spectral_gains(spectra: Iterable[Spectrum], most: int) -> dict[str, tuple[float, ...]]:
    """Squared singular values of each layer: what a further rank adds to the part that is represented.

    ||M||²_F less that of its best rank-r approximation is the sum of the others (Eckart & Young).

    Args:
        most: largest rank.
    """
    return {spectrum.layer: tuple(value * value for value in spectrum.values[:most]) for spectrum in spectra}


def overlay(chosen: Plan, adapter: AdapterConfig) -> dict[str, dict[str, float]]:
    """The configuration keys of a plan, as an arm's `set` takes them.

    Alpha follows the rank, so that every layer keeps the scale c of the constant rank: otherwise layers with
    few ranks would get a larger one.

    Args:
        adapter: whose r, alpha and rslora decide that scale.
    """
    power = 0.5 if adapter.rslora else 1.0
    alphas = {name: adapter.scale * rank**power for name, rank in chosen.ranks.items()}
    short = {name: float(f"{alpha:.12g}") for name, alpha in alphas.items()}
    return {RANKS: dict(chosen.ranks), ALPHAS: short}


def overlay_yaml(keys: Mapping[str, Mapping[str, float]]) -> str:
    """The keys as YAML: the value of an arm's `set`."""
    return yaml.safe_dump({key: dict(value) for key, value in keys.items()}, sort_keys=False)


def overlay_words(keys: Mapping[str, Mapping[str, float]]) -> str:
    """The keys as words of a command line, none with a space: for `$(cat FILE)` after `qdora train`."""
    return " ".join(f"--set {k}={json.dumps(v, separators=(',', ':'))}" for k, v in keys.items()) + "\n"
