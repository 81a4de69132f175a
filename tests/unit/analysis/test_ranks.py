"""Ranks under a budget, and the configuration that says them."""

from __future__ import annotations

import itertools

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from qdora.adapters.inject import layer_config
from qdora.analysis.ranks import (
    ALPHAS,
    RANKS,
    allocate,
    overlay,
    overlay_words,
    overlay_yaml,
    plan,
    spectral_gains,
)
from qdora.analysis.spectra import Spectrum
from qdora.config import AdapterConfig
from qdora.config_file import apply_overrides
from qdora.errors import InputError
from tests.unit.experiments.runs import run_config

GAINS = st.lists(st.floats(0.01, 10), min_size=1, max_size=4).map(lambda v: sorted(v, reverse=True))


def captured(gains: dict[str, list[float]], ranks: dict[str, int]) -> float:
    return sum(sum(gains[name][:rank]) for name, rank in ranks.items())


def cost_of(costs: dict[str, int], ranks: dict[str, int]) -> int:
    return sum(costs[name] * rank for name, rank in ranks.items())


def brute_force(gains: dict[str, list[float]], costs: dict[str, int], budget: int) -> float:
    """The most that any ranks capture within the budget."""
    choices = itertools.product(*(range(1, len(values) + 1) for values in gains.values()))
    allowed = [dict(zip(gains, ranks, strict=True)) for ranks in choices]
    return max(captured(gains, ranks) for ranks in allowed if cost_of(costs, ranks) <= budget)


def by_density(gains: dict[str, list[float]], costs: dict[str, int], budget: int) -> dict[str, int]:
    """Ranks in the order of their gain per parameter, up to the first that does not fit."""
    ranks, left = dict.fromkeys(gains, 1), budget - sum(costs.values())
    items = [(-g / costs[name], i, name) for i, name in enumerate(gains) for g in gains[name][1:]]
    for _, _, name in sorted(items):
        left -= costs[name]
        if left < 0:
            break
        ranks[name] += 1
    return ranks


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(GAINS, st.integers(1, 5)), min_size=1, max_size=4), st.integers(0, 30))
def test_the_budget_holds_and_nothing_of_equal_cost_is_better(layers, more):
    """Catches: a budget that is exceeded, a rank of 0 or above the most, budget left over that a rank had
    fitted into, and a greedy step by gain instead of gain per parameter."""
    gains = {f"layer{i}": values for i, (values, _) in enumerate(layers)}
    costs = {f"layer{i}": cost for i, (_, cost) in enumerate(layers)}
    budget = sum(costs.values()) + more
    ranks = allocate(gains, costs, budget)
    spent = cost_of(costs, ranks)
    assert spent <= budget
    assert all(1 <= ranks[name] <= len(gains[name]) for name in gains)
    assert all(ranks[name] == len(gains[name]) or spent + costs[name] > budget for name in gains)
    prefix = by_density(gains, costs, budget)
    assert all(ranks[name] >= prefix[name] for name in gains)
    assert captured(gains, prefix) == pytest.approx(brute_force(gains, costs, cost_of(costs, prefix)))


@settings(max_examples=100, deadline=None)
@given(st.lists(GAINS, min_size=1, max_size=4), st.integers(0, 12))
def test_greedy_is_brute_force_where_layers_are_alike(values, more):
    """Catches: an allocation that is not the best where it can be: layers of one shape."""
    gains = {f"layer{i}": own for i, own in enumerate(values)}
    costs = dict.fromkeys(gains, 7)
    budget = 7 * len(gains) + 5 * more
    ranks = allocate(gains, costs, budget)
    assert captured(gains, ranks) == pytest.approx(brute_force(gains, costs, budget))


def test_gain_per_parameter_decides():
    """Catches: a wide layer that gets the rank because its gain is larger, whatever it costs."""
    gains = {"wide": [9.0, 5.0], "narrow": [9.0, 4.0]}
    assert allocate(gains, {"wide": 10, "narrow": 2}, 15) == {"wide": 1, "narrow": 2}
    assert allocate(gains, {"wide": 10, "narrow": 2}, 23) == {"wide": 1, "narrow": 2}
    assert allocate(gains, {"wide": 10, "narrow": 2}, 24) == {"wide": 2, "narrow": 2}
    assert allocate({"a": [1.0, 0.0], "b": [1.0, 0.5]}, {"a": 1, "b": 1}, 9) == {"a": 1, "b": 2}


def test_a_budget_below_rank_one():
    """Catches: a layer without a rank, or a refusal that does not say what would do."""
    with pytest.raises(InputError, match=r"--budget 11: rank 1 in each of 2 layers takes 12 parameters"):
        allocate({"a": [1.0], "b": [1.0]}, {"a": 10, "b": 2}, 11)


SHAPES = {"model.layers.0.q_proj": (8, 6), "model.layers.1.q_proj": (4, 6), "model.layers.1.up_proj": (30, 6)}


def test_a_plan_beside_the_constant_rank():
    """Catches: in or out alone for in + out, a constant rank above a layer's sides, a wrong fraction."""
    gains = {name: [4.0, 1.0, 1.0, 0.5, 0.5] for name in SHAPES}
    chosen = plan(gains, SHAPES, None, 5)
    assert chosen.constant_parameters == chosen.budget == 5 * 14 + 4 * 10 + 5 * 36
    assert chosen.constant_gain == pytest.approx((7 + 6.5 + 7) / 21)
    assert chosen.parameters == sum(r * sum(SHAPES[name]) for name, r in chosen.ranks.items())
    small = plan(gains, SHAPES, 75, 5)
    assert small.ranks == {
        "model.layers.0.q_proj": 1,
        "model.layers.1.q_proj": 2,
        "model.layers.1.up_proj": 1,
    }
    assert small.gain == pytest.approx((4 + 5 + 4) / 21)


def test_gains_of_spectra():
    """Catches: values for their squares, more ranks than the largest one."""
    spectra = [Spectrum("a", 0, "a", "base", (3.0, 1.0, 0.5)), Spectrum("b", 0, "b", "base", (2.0,))]
    assert spectral_gains(spectra, 2) == {"a": (9.0, 1.0), "b": (4.0,)}


@pytest.mark.parametrize("rslora", [False, True])
def test_the_overlay_is_an_arms_set_and_words_of_a_command(rslora):
    """Catches: YAML that the parser of runs refuses or reads as other ranks, words that a shell splits
    further, and a scale that changes with the rank."""
    gains = {name: [4.0, 3.0, 1.0] for name in SHAPES}
    adapter = AdapterConfig(r=2, alpha=7.0, rslora=rslora)
    chosen = plan(gains, SHAPES, 140, 2)
    keys = overlay(chosen, adapter)
    arm = yaml.safe_load(overlay_yaml(keys))
    assert arm.keys() == {RANKS, ALPHAS}
    own = {"adapter.r": 2, "adapter.alpha": 7.0, "adapter.rslora": rslora}
    configured = run_config({**own, **arm}).adapter
    words = overlay_words(keys).split()  # as a shell splits what $(cat FILE) gives: quotes stay
    assert words[::2] == ["--set", "--set"]
    tree: dict = {}
    apply_overrides(tree, words[1::2])
    assert tree["adapter"]["rank_pattern"] == configured.rank_pattern == chosen.ranks
    assert len(set(chosen.ranks.values())) > 1
    for name, rank in chosen.ranks.items():
        layer = layer_config(configured, name)
        assert layer.r == rank
        assert layer.scale == pytest.approx(adapter.scale)
