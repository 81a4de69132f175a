"""Grids: which points there are, which runs they make, and which is chosen."""

from __future__ import annotations

from typing import Any

import pytest

from qdora.config_file import check_config
from qdora.errors import InputError
from qdora.experiments.arms import ArmRun, CompareConfig, expand
from qdora.experiments.grid import GridPoint, choose, condensed, edges, grid_points, point_name

from .runs import run_tree

RATES = {"training.learning_rate": [1e-4, 3e-4]}
A, B = {"name": "a"}, {"name": "b", "set": {"adapter.dora": False}}


def comparison(*arms: dict[str, Any], **keys: Any) -> CompareConfig:
    tree = {"base": "b.yaml", "arms": list(arms or (A, B)), "output": {"dir": "runs/c"}, **keys}
    return check_config(tree, CompareConfig, "test")


def runs_of(*arms: dict[str, Any], **keys: Any) -> list[ArmRun]:
    tree = run_tree()
    tree["data"]["validation"] = 8
    return expand(tree, comparison(*arms, **keys))


def test_points_are_the_product_in_the_order_of_the_file():
    """Catches: values paired instead of crossed, or in another order than ties are decided by."""
    points = grid_points({"training.learning_rate": [1e-4, 3e-4], "adapter.r": [8, 16]})
    assert [tuple(point.values()) for point in points] == [(1e-4, 8), (1e-4, 16), (3e-4, 8), (3e-4, 16)]
    assert points[1] == {"training.learning_rate": 1e-4, "adapter.r": 16}
    assert grid_points({}) == [{}]


def test_folders_of_points_differ_and_do_not_depend_on_the_order():
    """Catches: two points in one folder; a point trained again because its keys stand in another order; a
    folder's name that leaves the folder, or is too long for a file system."""
    one = {"training.learning_rate": 1e-4, "adapter.r": 16}
    assert point_name(one) == "adapter.r=16,training.learning_rate=0.0001"
    assert point_name(dict(reversed(one.items()))) == point_name(one)
    odd = [{"model.path": "../x/y"}, {"model.path": "../x/z"}, {"adapter.targets": ["q_proj"] * 60}]
    names = [point_name(point) for point in odd]
    assert len({*names}) == 3
    assert all("/" not in name and len(name) < 64 for name in names)


def points(*scores: tuple[str, int]) -> list[GridPoint]:
    return [GridPoint(arm, {"adapter.r": i}, n, 10, False, "") for i, (arm, n) in enumerate(scores)]


def test_the_best_point_of_each_arm_is_chosen_and_of_equals_the_first():
    """Catches: one best of all arms, the last of equals, or a worst point chosen."""
    chosen = choose(points(("a", 3), ("a", 5), ("b", 9), ("a", 5), ("b", 2)))
    assert [point.chosen for point in chosen] == [False, True, True, False, False]
    assert [point.correct for point in chosen] == [3, 5, 9, 5, 2]


def test_a_choice_at_the_edge_of_its_numbers_is_seen():
    """Catches: the largest of the grid taken for its best without a word; rates compared as texts, where 3e-3
    stands before 3e-4; an inner value, a word or the only value of a key called an edge."""
    rates = ["1e-3", "3e-3", "3e-4"]
    settings = [{"training.learning_rate": rate, "adapter.init": "kaiming", "adapter.r": 8} for rate in rates]
    arms = {"large": 1, "inner": 0, "small": 2}
    grid = [
        GridPoint(arm, s, 0, 9, i == best, "") for arm, best in arms.items() for i, s in enumerate(settings)
    ]
    assert edges(grid) == {"large": ["training.learning_rate"], "small": ["training.learning_rate"]}
    words = [GridPoint("a", {"adapter.init": word}, 0, 9, word == "pissa", "") for word in ("olora", "pissa")]
    assert edges(words) == {}


def test_a_mapping_over_layers_is_one_row_of_a_table():
    """Catches: hundreds of rows before the first score; a few keys of a section hidden in one."""
    layers = {f"adapter.rank_pattern.layers.{i}.q_proj": ["null", str(i + 2)] for i in range(30)}
    rows = {"adapter.r": ["8", "8"], **layers, "data.train.limit": ["1", "2"], "data.train.seed": ["0", "1"]}
    assert condensed(rows) == {
        "adapter.r": ["8", "8"],
        "adapter.rank_pattern": ["null", "30 values, 2 to 31"],
        "data.train.limit": ["1", "2"],
        "data.train.seed": ["0", "1"],
    }


def test_every_point_is_a_run_of_every_trained_arm():
    """Catches: an arm left out of the grid; two runs in one folder; an untrained arm with a grid, or with a
    run for each seed; a swept value that loses against the shared one."""
    arms = {"name": "zero", "train": False}, A, B
    runs = runs_of(*arms, seeds=[3, 5], sweep=RATES, set={"training.learning_rate": 1.0})
    found = [(r.seed, r.arm, r.config.training.learning_rate) for r in runs]
    product = [(seed, arm, rate) for seed in (3, 5) for arm in "ab" for rate in (1e-4, 3e-4)]
    assert found == [(3, "zero", 1.0), *product]
    assert [run.train for run in runs] == [False] + 8 * [True]
    assert len({run.directory.path for run in runs}) == len({str(run) for run in runs}) == 9
    assert str(runs[2]) == "arm 'a', seed 3, training.learning_rate=0.0003"
    assert runs[2].point == {"training.learning_rate": 3e-4}


def test_an_arm_may_have_a_grid_of_its_own():
    """Catches: the comparison's grid used for an arm that has its own."""
    own = {"name": "b", "sweep": {"adapter.r": [2, 4]}}
    runs = runs_of(A, own, sweep=RATES)
    assert [run.point for run in runs[2:]] == [{"adapter.r": 2}, {"adapter.r": 4}]
    assert [run.config.adapter.r for run in runs] == [16, 16, 2, 4]


@pytest.mark.parametrize(
    ("arms", "keys", "message"),
    [
        (
            [A, {"name": "b", "set": {"training.learning_rate": 1e-3}}],
            {"sweep": RATES},
            "arm 'b' sets training.learning_rate, but training.learning_rate is swept",
        ),
        (
            [A, {"name": "b", "set": {"adapter": {"dropout": 0.1}}}],
            {"sweep": {"adapter.r": [2]}},
            "arm 'b' sets adapter, but adapter.r is swept",
        ),
        (
            [A, B],
            {"sweep": {"training.seed": [1, 2]}},
            "sweeps training.seed, .* use seeds of the comparison",
        ),
        ([A, B], {"sweep": {"output.dir": ["x"]}}, "sweeps output.dir, .* use output of the comparison"),
        ([A, B], {"sweep": {"data": [{}]}}, "sweeps data, which no grid may; use set of the comparison"),
        ([A, B], {"sweep": {"evaluation.limit": [1, 2]}}, "sweeps evaluation.limit, .* use set of an arm"),
        ([A, B], {"sweep": {"data.train.seed": [1]}}, "sweeps data.train.seed, .* left out for validation"),
        (
            [A, B],
            {"sweep": {"data.validation": [1]}},
            "sweeps data.validation, .*scored on the same examples",
        ),
        ([A, B], {"sweep": {"adapter.r": []}}, "sweep.adapter.r: .*at least 1"),
        ([A, B], {"sweep": {"adapter.r": 8}}, "sweep.adapter.r: .*got 8"),
        ([A, B], {"sweep": {"adapter.r": [8, 4, 8]}}, "sweeps adapter.r over repeated values: 8"),
        (
            [A, B],
            {"sweep": {"adapter": [{"r": 1}], "adapter.r": [8]}},
            "sweeps adapter and adapter.r, which is part of it",
        ),
        (
            [A, {"name": "b", "sweep": {"adapter.r": [2, 4, 8]}}],
            {"sweep": RATES},
            "arms have grids of different sizes: a 2, b 3; give all the same number of points",
        ),
        ([A, {"name": "b", "sweep": RATES}], {}, "grids of different sizes: a 1, b 2"),
        (
            [A, {"name": "b", "train": False, "sweep": RATES}],
            {},
            "arm 'b' is not trained .*, so it has no sweep",
        ),
        (
            [A, {"name": "b", "train": False, "set": {"adapter.r": 3}}],
            {},
            "arm 'b' sets adapter.r, which changes nothing where nothing is trained .*allowed there: keys of",
        ),
        (
            [A, {"name": "b", "train": False, "set": {"training": {"max_steps": 3}}}],
            {},
            "arm 'b' sets training.max_steps, which changes nothing",
        ),
        ([A, {"name": "b", "sweeep": RATES}], {}, "unknown key 'arms.1.sweeep'.*did you mean 'sweep'"),
        ([A, {"name": "b", "set": {"data.validation": 3}}], {}, "sets data.validation, .*leave out the same"),
    ],
)
def test_what_is_no_fair_grid_is_refused(arms, keys, message):
    """Catches: an arm that is tuned more than another, or on the test set; a setting without effect."""
    with pytest.raises(InputError, match=message):
        comparison(*arms, **keys)


def test_a_wrong_point_is_refused_with_its_arm_before_anything_runs():
    """Catches: a point that is found to be impossible when the points before it have been trained."""
    with pytest.raises(
        InputError, match=r"b.yaml with arm 'a', adapter.rr=4: unknown key .*did you mean 'r'"
    ):
        runs_of(sweep={"adapter.rr": [4]})
    with pytest.raises(InputError, match=r"arm 'a', adapter.r=0: adapter.r: .*greater than or equal to 1"):
        runs_of(sweep={"adapter.r": [4, 0]})
    with pytest.raises(InputError, match=r"arm 'a', model.path.x=1: .*'path' holds 'some/model'"):
        runs_of(sweep={"model.path.x": [1]})
    changing = {"training.mode": ["adapter", "full"]}
    with pytest.raises(InputError, match=r"points of the grid of arm 'a' differ in adapter.type: 'lora' and"):
        runs_of(A, {"name": "b"}, sweep=changing, set={"model.quantization": "none"})


def test_a_grid_needs_examples_to_choose_on():
    """Catches: the best of a grid chosen on the test set."""
    with pytest.raises(InputError, match=r"data.validation is null; say how many"):
        expand(run_tree(), comparison(sweep=RATES))
    runs = expand(run_tree(), comparison(sweep=RATES, set={"data.validation": 4}))
    assert {run.config.data.validation for run in runs} == {4}


def test_arms_leave_out_the_same_examples():
    """Catches: an arm whose section replaces the shared one, and with it what is left out of training."""
    tree = run_tree()
    section = {"data": dict(tree["data"])}
    tree["data"]["validation"] = 8
    with pytest.raises(InputError, match=r"arms 'a' and 'b' differ in data.validation: 8 and None; use set"):
        expand(tree, comparison(A, {"name": "b", "set": section}))
