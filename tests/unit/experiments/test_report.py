"""The figures and files of a report, from runs made up by hand."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest

from qdora.config_file import check_config
from qdora.errors import InputError
from qdora.experiments.arms import CONDITIONS, ArmRun, CompareConfig
from qdora.experiments.grid import GridPoint
from qdora.experiments.report import build_report, write_report

from .runs import arm_of, numeric, scores_of


def arm(name: str, answers: str, seed: int = 0, **changes: Any) -> ArmRun:
    return arm_of(name, [numeric(answers)], seed, **changes)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_files_and_figures(tmp_path):
    """Catches: an arm left out, the difference taken the wrong way round, a mean over the entire curve."""
    plain = {"adapter.dora": False, "adapter.targets": ["q_proj", "v_proj"]}
    runs = [arm("qlora", "TFFFFF", settings=plain), arm("qdora", "TTTTFF", loss=0.5)]
    report = write_report(tmp_path, runs, {"base": [numeric("FFFFFT")]})
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(report))
    assert report["reference"] == "qlora"
    assert "difference" not in report["arms"]["qlora"]["tasks"]["gsm8k"]
    entry = report["arms"]["qdora"]["tasks"]["gsm8k"]
    assert entry["difference"]["points"] == pytest.approx(50)
    assert entry["difference"]["p_value"] == pytest.approx(0.25)
    assert entry["difference"]["verdict"] == "no difference shown"
    assert report["arms"]["qdora"]["final_loss"] == pytest.approx((1.5 + 0.5) / 2)
    assert report["arms"]["qlora"]["tokens_per_second"] == pytest.approx(100 * 210 / 10)
    assert report["arms"]["qlora"]["trainable_percent"] == pytest.approx(100 * 4321 / (4321 + 1234567))
    page = (tmp_path / "report.md").read_text()
    for words in (
        "# qlora against qdora",
        "1,234,567",
        "66.7 [30.0, 90.3]",
        "+50.0",
        "0.250",
        "4,321",
        "0.50",
    ):
        assert words in page, words
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines()]
    assert ["trained", "nf4 + lora", "nf4 + lora + dora"] in cells
    assert ["adapter.dora", "false", "true"] in cells
    assert report["differences"]["adapter.targets"]["qlora"] == ["q_proj", "v_proj"]
    assert report["differences"].keys() == plain.keys()
    assert "initial A" in page
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_seeds_are_averaged():
    """Catches: one seed reported for all, seeds of different arms paired across each other."""
    runs = [arm("a", "TFFF", 0), arm("b", "TTTF", 0), arm("a", "FFFF", 1), arm("b", "TTTT", 1)]
    report = build_report(runs, {"base": [numeric("FFFF")]})
    assert report["seeds"] == [0, 1]
    entry = report["arms"]["b"]["tasks"]["gsm8k"]
    assert entry["by_seed"] == [0.75, 1.0]
    assert entry["score"] == pytest.approx(0.875)
    assert entry["difference"]["points"] == pytest.approx(75)
    assert entry["difference"]["seeds"] == "paired"


@pytest.mark.parametrize("fact", CONDITIONS)
def test_other_conditions_are_refused_by_name(fact):
    """Catches: arms compared that did not see the same base, data, order, steps or initial A."""
    results = [arm("a", "TF"), arm("b", "TF", **{fact: "other"})]
    with pytest.raises(InputError, match=rf"arms 'a' and 'b' differ in {fact}: .*'other'"):
        build_report(results, {})
    build_report([arm("a", "TF"), arm("b", "TF", trainable_parameters=5)], {})


def test_other_questions_are_never_paired():
    """Catches: answers paired by their place that belong to other questions, in scores of the same length."""
    other = scores_of({"normalized": "TF", "published": "TF"}, "gsm8k")
    turned = [*reversed(other.predictions)]
    results = [arm("a", "TF"), arm_of("b", [type(other)(**{**vars(other), "predictions": tuple(turned)})])]
    with pytest.raises(
        ValueError, match="arm 'a', seed 0 and arm 'b', seed 0 do not answer the same questions"
    ):
        build_report(results, {})


def test_what_differs_is_not_called_the_same(tmp_path):
    """Catches: a page that says "same initial A" of arms of two ranks, or one base of two."""
    results = [
        arm("r8", "TF", settings={"adapter.r": 8}),
        arm("r64-16bit", "TF", settings={"model.quantization": "none"}, initial_a="other"),
    ]
    bases = {"base of r8": [numeric("FF")], "base of r64-16bit": [numeric("FT")]}
    report = write_report(tmp_path, results, bases)
    assert "initial_a" not in report["conditions"]
    for name in ("report.md", "report.html"):
        page = (tmp_path / name).read_text()
        assert "initial A" not in page
        assert "base of r8, no adapter" in page
        assert "base of r64-16bit, no adapter" in page
    assert report["bases"]["base of r64-16bit"]["tasks"]["gsm8k"]["score"] == 0.5


def many(answers: dict[str, dict[str, str]], name: str, **options: Any) -> ArmRun:
    """An arm with several tasks, by task and scorer."""
    return arm_of(name, [scores_of(of, task) for task, of in answers.items()], **options)


def test_every_table_is_corrected_for_its_tests():
    """Catches: p-values left as they are, or corrected for those of other scorers too; a mean over tasks of a
    scorer that one of them lacks, or weighted by questions."""
    few, lots = "T" * 9 + "F", "F" * 10 + "T" * 10
    plain = {"x": {"n": "F" * 10, "p": "F" * 10}, "y": {"n": lots, "q": lots}}
    better = {"x": {"n": few, "p": few}, "y": {"n": lots, "q": lots[::-1]}}
    report = build_report([many(plain, "a"), many(better, "b"), many(plain, "c")], {})
    b = report["arms"]["b"]
    raw = b["tasks"]["x"]["difference"]["p_value"]
    assert raw == pytest.approx(2 * 0.5**9)
    # Headline: two arms on two tasks and their mean are six tests, by the mean the smallest p of all.
    mean = b["average"]["difference"]
    assert mean["points"] == pytest.approx((90 + 0) / 2)
    assert b["average"]["total"] == 30
    assert b["average"]["scorers"].keys() == {"n"}
    assert mean["p_corrected"] == pytest.approx(6 * mean["p_value"])
    assert b["tasks"]["x"]["difference"]["p_corrected"] == pytest.approx(5 * raw)
    assert b["tasks"]["x"]["scorers"]["p"]["difference"]["p_corrected"] == pytest.approx(2 * raw)
    assert b["tasks"]["y"]["scorers"]["q"]["difference"]["points"] == 0
    assert b["tasks"]["x"]["difference"]["verdict"] == "higher"


def test_tables_of_values(tmp_path):
    """Catches: a seed, scorer or task that is missing in the files to compute with; a mean that has no counts
    among the counts."""
    of = {"x": {"n": "TFFT", "p": "TFFF"}, "y": {"n": "TF", "p": "FF"}}
    runs = [many(of, name, seed=seed) for seed in (3, 5) for name in ("a", "b")]
    write_report(tmp_path, runs, {"base": runs[0].scores})
    scores = rows_of(tmp_path / "scores.csv")
    assert len(scores) == 2 * 2 * 2 * 2 + 2 * 2
    row = next(r for r in scores if (r["arm"], r["seed"], r["task"], r["scorer"]) == ("b", "5", "x", "p"))
    assert (row["correct"], row["total"], row["headline"]) == ("1", "4", "False")
    assert float(row["low"]) < float(row["score"]) == 0.25 < float(row["high"])
    assert {r["seed"] for r in scores if r["arm"] == "base"} == {""}
    differences = rows_of(tmp_path / "differences.csv")
    assert {(r["arm"], r["task"], r["scorer"]) for r in differences} == {
        ("b", task, scorer) for task in ("x", "y", "average") for scorer in "np"
    }
    assert {r["verdict"] for r in differences} == {"no difference shown"}
    answers = rows_of(tmp_path / "answers.csv")
    assert len(answers) == 2 * (4 + 2)
    row = next(r for r in answers if (r["question"], r["scorer"]) == ("some/data/x.json:3", "n"))
    assert {key: row[key] for key in list(row)[3:]} == dict.fromkeys(
        ("a-seed3", "b-seed3", "a-seed5", "b-seed5"), "1"
    )
    of_n = [r["b-seed5"] for r in answers if (r["task"], r["scorer"]) == ("x", "n")]
    assert of_n == ["1", "0", "0", "1"]


def test_an_arm_without_training_has_no_cost(tmp_path):
    """Catches: a report that needs metrics of every arm, or that says how an untrained arm was trained."""
    runs = [arm("zero-shot", "TFFF", trained=False), arm("qdora", "TTTF"), arm("none", "TFFF", trained=False)]
    runs.append(arm("qdora", "TTTT", seed=1))
    runs.append(arm("r4", "TTTF", settings={"adapter.r": 4}))
    report = write_report(tmp_path, runs, {})
    assert report["arms"]["zero-shot"]["trained"] == "nf4, not trained"
    assert report["arms"]["zero-shot"]["seeds"] == [0]
    assert "seconds_per_step" not in report["arms"]["zero-shot"]
    found = report["arms"]["qdora"]["tasks"]["gsm8k"]["difference"]
    assert found["points"] == pytest.approx(100 * (0.875 - 0.25))
    assert found["seeds"] == "independent"
    assert {"batch_order", "steps", "initial_a"} <= report["conditions"].keys()
    assert report["manifest"]["same"]["steps"] == 20
    page = (tmp_path / "report.md").read_text()
    cost = page.partition("## Cost")[2].partition("##")[0]
    assert "qdora" in cost
    assert "zero-shot" not in cost
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines()]
    assert ["adapter.r", "", "16", "", "4"] in cells
    untrained = write_report(tmp_path, [runs[0], runs[2]], {})
    assert untrained["arms"]["none"]["tasks"]["gsm8k"]["difference"]["points"] == 0
    page = (tmp_path / "report.html").read_text()
    assert 'id="cost"' not in page
    assert "nf4, not trained" in page


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2)])
def test_trained_arms_are_held_against_each_other_beside_untrained_ones(tmp_path, order):
    """Catches: arms behind an untrained one that are no longer compared with one another; one run taken for
    one of several seeds."""
    arms = [
        arm("zero", "TFFF", trained=False),
        arm("a", "TTFF"),
        arm("longer", "TTTF", trained=False, settings={"evaluation.max_new_tokens": 9}),
    ]
    runs = [*(arms[i] for i in order), arm("a", "TTTF", seed=1)]
    report = write_report(tmp_path, runs, {"base": [numeric("TFFF")]})
    points = [report["arms"][name]["tasks"]["gsm8k"].get("difference") for name in ("zero", "a")]
    found = next(entry for entry in points if entry is not None)
    assert found["points"] == pytest.approx(37.5 if order[0] == 0 else -37.5)
    with pytest.raises(InputError, match="arms 'a' and 'b' differ in batch_order"):
        build_report([*runs, arm("b", "TFTF", batch_order="other")], {})


def test_disagreements_are_counted_and_listed_without_text(tmp_path):
    """Catches: scorers that disagree unseen; the two sides exchanged; third-party text in a report."""
    of = {"gsm8k": {"n": "TTF" + "T" * 25, "p": "FTT" + "F" * 25}}
    report = write_report(tmp_path, [many(of, "a"), many(of, "b")], {})
    found = report["disagreements"]["gsm8k"]
    assert found["answers"] == 2 * 28
    assert found["counts"] == [{"scorers": ["n", "p"], "first_only": 2 * 26, "second_only": 2}]
    assert len(found["questions"]) == 20
    assert found["questions"][1] == {
        "origin": "data/gsm8k.json:2",
        "arm": "a",
        "seed": 0,
        "scorers": {
            "n": {"extracted": "2", "gold": "7", "correct": False},
            "p": {"extracted": "7", "gold": "7", "correct": True},
        },
    }
    for name in ("report.json", "report.html", "report.md", "scores.csv"):
        text = (tmp_path / name).read_text()
        assert "the question" not in text
        assert "the output" not in text


def test_grid_and_published_figures(tmp_path):
    """Catches: the chosen point not marked, or not that it is the grid's largest; a grid left out; published
    figures of another arm or task."""
    grid = [
        GridPoint("b", {"training.learning_rate": 1e-4}, 5, 20, chosen=False, directory="g/1"),
        GridPoint("b", {"training.learning_rate": 1e-3}, 9, 20, chosen=True, directory="g/2"),
    ]
    published = {"b": {"gsm8k": 60.0, "average": 50.0}}
    report = write_report(
        tmp_path,
        [arm("a", "TFFF"), arm("b", "TTTF")],
        {},
        grid,
        published=published,
        published_source="A paper, <table> 1",
    )
    assert [(point["chosen"], point["score"]) for point in report["grid"]] == [(False, 0.25), (True, 0.45)]
    assert report["published"]["scores"] == [
        {"arm": "b", "task": "gsm8k", "published": 60.0, "ours": 75.0, "difference": 15.0},
        {"arm": "b", "task": "average", "published": 50.0, "ours": None, "difference": None},
    ]
    page = (tmp_path / "report.md").read_text()
    assert re.search(r"training.learning_rate 0.001 +\| 45.0 \[.*\] +\| chosen, .*rate at the edge", page)
    assert "may lie beyond" in page
    assert not re.search(r"training.learning_rate 0.0001 +\| 25.0 \[.*\] +\| chosen", page)
    html = (tmp_path / "report.html").read_text()
    assert "A paper, &lt;table&gt; 1" in html
    assert "chosen" in html
    assert "training.learning_rate at the edge" in html


def test_one_manifest_for_what_all_runs_share():
    """Catches: a version or commit of one run shown for all; the count of leaked questions left out."""
    changed = {"versions.torch": "3"}
    report = build_report([arm("a", "TF"), arm("b", "TF", **changed)], {})
    assert report["manifest"]["same"]["base.fingerprint"] == "b"
    assert report["manifest"]["by_run"]["versions.torch"] == {"a-seed0": "2", "b-seed0": "3"}
    assert report["data"]["a"]["leaked_questions_removed"] == 2
    assert report["data"]["a"]["leaked_validation_questions_removed"] == 1
    assert "fingerprints" not in report["data"]["a"]


def test_the_same_runs_make_the_same_files(tmp_path):
    """Catches: a date, a random id or another bootstrap in each report."""
    runs = [arm("a", "TFFFFF", s) for s in (0, 1)] + [arm("b", "TTTFFF", s) for s in (0, 1)]
    for name in ("one", "two"):
        write_report(tmp_path / name, runs, {})
    for file in ("report.html", "report.json", "report.md", "scores.csv", "differences.csv"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"published": {"qdoar": {"x": 50}}, "published_source": "s"},
            "no arm 'qdoar'; did you mean 'qdora'",
        ),
        ({"published": {"qdora": {"x": 50}}}, "published is given without published_source"),
        ({"published_source": "s"}, "published_source is given without published"),
        (
            {"published": {"qdora": {"x": 101}}, "published_source": "s"},
            "published.qdora.x: .*less than or equal",
        ),
    ],
)
def test_published_figures_are_checked_before_anything_is_trained(keys, message):
    """Catches: a misspelt arm whose figures are never shown; numbers that are no percent; figures without
    their source."""
    tree = {"base": "b.yaml", "arms": [{"name": "qlora"}, {"name": "qdora"}], "output": {"dir": "runs/c"}}
    with pytest.raises(InputError, match=message):
        check_config({**tree, **keys}, CompareConfig, "test")
    check_config(
        {**tree, "published": {"qdora": {"x": 61.9}}, "published_source": "s"}, CompareConfig, "test"
    )
