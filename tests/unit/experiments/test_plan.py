"""Progress of a comparison, and the time that is left."""

from __future__ import annotations

import json

import pytest

from qdora.config_file import check_config
from qdora.experiments.arms import ArmRun, CompareConfig, expand
from qdora.experiments.plan import Progress, dry_run_page, plan_items, show_duration, training_settings

from .runs import manifest_of, numeric, run_tree

SWEEP = {"adapter.r": [2, 4]}


def comparison(folder="runs/c", **keys) -> tuple[CompareConfig, list[ArmRun]]:
    arms = [{"name": "zero", "train": False}, {"name": "a"}, {"name": "b", "set": {"adapter.dora": False}}]
    tree = {"base": "b.yaml", "arms": arms, "output": {"dir": str(folder)}, "seeds": [0, 1], **keys}
    config = check_config(tree, CompareConfig, "test")
    shared = run_tree()
    shared["data"]["validation"] = 4
    runs = [ArmRun(**{**vars(run), "manifest": manifest_of({}, run.seed)}) for run in expand(shared, config)]
    return config, runs


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59, "59 s"),
        (252, "4 min 12 s"),
        (2760, "46 min"),
        (3599, "1 h 0 min"),
        (11_400, "3 h 10 min"),
    ],
)
def test_durations(seconds, text):
    """Catches: minutes of 60 seconds, hours of 60 minutes."""
    assert show_duration(seconds) == text


def test_all_work_is_planned_once():
    """Catches: the chosen point trained twice with the first seed, or not with the others; an untrained arm
    that waits for a seed."""
    items = plan_items(comparison(sweep=SWEEP)[1])
    assert [(str(item), item.trains, len(item.runs)) for item in items] == [
        ("zero", False, 1),
        ("a seed 0, adapter.r=2", True, 1),
        ("a seed 0, adapter.r=4", True, 1),
        ("b seed 0, adapter.r=2", True, 1),
        ("b seed 0, adapter.r=4", True, 1),
        ("a seed 0", False, 2),
        ("b seed 0", False, 2),
        ("a seed 1", True, 2),
        ("b seed 1", True, 2),
    ]
    plain = plan_items(comparison()[1])
    names = ["zero", "a seed 0", "b seed 0", "a seed 1", "b seed 1"]
    assert [(str(item), item.trains) for item in plain] == [(n, n != "zero") for n in names]


def test_a_line_for_each_finished_run():
    """Catches: time left by the mean, which one slow run spoils; scoring taken for training; a number of
    runs that is never reached."""
    lines: list[str] = []
    items = plan_items(comparison()[1])
    progress = Progress(items, lines.append)
    zero, a0, b0, a1, b1 = items
    progress.finish(zero, [numeric("TFFF")], 7)
    progress.finish(a0, [numeric("TTFF")], 252)
    progress.finish(b0, [numeric("TTTF")], 2000, again=True)
    progress.finish(a1, [numeric("TTFF")], 10_000)
    progress.finish(b1, [numeric("TTFF"), numeric("TTTT")], 60)
    assert lines == [
        "[1/5] zero: exact match 25.0%, 7 s; time left unknown",
        "[2/5] a seed 0: exact match 50.0%, 4 min 12 s; about 13 min left",
        "[3/5] b seed 0: exact match 75.0%, finished before",
        "[4/5] a seed 1: exact match 50.0%, 2 h 47 min; about 33 min left",
        "[5/5] b seed 1: exact match 75.0% (mean of 2 tasks), 1 min 0 s",
    ]


def test_other_arms_count_by_their_median():
    """Catches: a mean, or the last one, where an arm has no finished run of its own."""
    lines: list[str] = []
    items = plan_items(comparison(sweep=SWEEP)[1])
    progress = Progress(items, lines.append)
    for item, seconds in zip(items[1:4], (30, 60, 900), strict=True):
        progress.finish(item, [numeric("TFFF")], seconds)
    assert lines[0].startswith("[1/9] a seed 0, adapter.r=2: validation exact match 25.0%, 30 s; about ")
    # Left: scoring of zero and a (no measure of scoring: the median of all, a's own is of training), b's
    # second point, its scoring, and another seed of each.
    left = 60 + 60 + 900 + 60 + 45 + 900
    assert lines[2].endswith(f"about {show_duration(left)} left")


def test_the_plan_names_what_is_done_and_what_is_known(tmp_path):
    """Catches: hours made up before anything has run; finished runs counted as left; a table without the
    grid; a dry run that writes."""
    config, runs = comparison(tmp_path / "c", sweep=SWEEP)
    page = dry_run_page(config, runs, {}, resume=True)
    assert "Estimated time: unknown until the first arm has been trained and scored." in page
    assert "2 removed from training as test questions, 1 as validation questions; 4 validation" in page
    assert "Identity checks passed. The same in all arms: base.fingerprint, " in page
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines()]
    assert ["adapter.r", "", "sweep: 2, 4", "sweep: 2, 4"] in cells
    assert ["adapter.dora", "", "true", "false"] in cells
    assert ["a seed 0, adapter.r=2", "20", "40", "4,321", "new", "unknown"] in cells
    assert ["a seed 1", "20", "40", "4,321", "at the chosen of 2 points", "unknown"] in cells
    assert not (tmp_path / "c").exists()

    done = next(run for run in runs if run.point == {"adapter.r": 2})
    directory = done.directory
    directory.start(done.config, dict(done.manifest))
    step = {"loss": 1.0, "lr": 1.0, "grad_norm": 1.0, "tokens": 1, "tokens_per_second": 1.0}
    step |= {"peak_memory_bytes": 1, "seconds": 0.1}
    lines = [json.dumps({"step": n, **step}) + "\n" for n in range(1, 21)]
    directory.metrics_file.write_text("".join(lines[:5]))
    page = dry_run_page(config, runs, {}, resume=True)
    assert "| after step 5 " in page
    assert "unknown until" in page  # nothing has been scored
    from qdora.evaluation.scores import write_scores

    write_scores(numeric("TTFF"), directory.validation)  # half a second a question
    directory.adapter.mkdir()
    (directory.adapter / "adapter_model.safetensors").write_bytes(b"")
    directory.metrics_file.write_text("".join(lines))
    page = dry_run_page(config, runs, {}, resume=True)
    assert "| trained, scored " in page
    # 3 points and 2 further seeds of 20 steps; 3 times 4 validation and 5 times 8 test questions.
    assert f"about {show_duration(5 * 2 + 12 / 2 + 40 / 2)}, from the steps and answers of a; taken" in page
    assert "taken to be like them: b." in page
    page = dry_run_page(config, runs, {}, resume=False)
    assert "trained, scored" not in page
    assert f"about {show_duration(6 * 2 + 16 / 2 + 40 / 2)}, " in page
    chosen = {"a": {"adapter.r": 2}}
    page = dry_run_page(config, runs, chosen, resume=True)
    assert [line.split("|")[5].strip() for line in page.splitlines() if "| a seed" in line] == [
        "trained, scored",
        "new",
        "trained",
        "new",
    ]


@pytest.mark.parametrize(
    ("key", "value", "shared"),
    [
        ("evaluation.weights", "merged", True),
        ("evaluation.max_new_tokens", 99, True),
        ("evaluation.loss_every", 2, False),
        ("training.learning_rate", 0.5, False),
        ("data.max_length", 77, False),
    ],
)
def test_runs_that_differ_in_how_they_are_scored_are_trained_once(key, value, shared):
    """Catches: a run that takes a training which it would not have had; one trained twice."""
    arms = [{"name": "a"}, {"name": "b", "set": {key: value}}]
    _, runs = comparison(arms=arms)
    assert [item.trains for item in plan_items(runs)] == [True, not shared] * 2
    first, second, other_seed = (training_settings(run.config) for run in runs[:3])
    assert (first == second) == shared
    assert first != other_seed
    _, runs = comparison(arms=arms, set={"training.keep_best": "exact_match", "evaluation.loss_every": 3})
    if key != "evaluation.loss_every":
        assert training_settings(runs[0].config) != training_settings(runs[1].config)  # scored meanwhile
