"""The report of a comparison, from runs made up by hand."""

from __future__ import annotations

import json

import pytest

from qdora.errors import InputError
from qdora.evaluation.scores import Prediction, Scores, summarize
from qdora.experiments.arms import CONDITIONS, ArmRun
from qdora.experiments.grid import GridPoint
from qdora.experiments.report import build_report, write_report
from qdora.tasks import task_for
from qdora.tasks.scoring import Verdict
from qdora.training.metrics import StepMetrics

from .runs import manifest_of, run_config


def scores(answers: str) -> Scores:
    def prediction(number: int, right: bool) -> Prediction:
        verdict = Verdict("1", "1" if right else "2", right)
        both = {"normalized": verdict, "published": verdict}
        return Prediction(f"q{number}", "p", "o", "1", verdict.gold, right, 3, True, both)

    return summarize(task_for("gsm8k"), [prediction(n, a == "T") for n, a in enumerate(answers)], {}, 2.0)


def arm(
    name: str, answers: str, seed: int = 0, loss: float = 1.0, settings: dict | None = None, **changes
) -> ArmRun:
    """An arm that was trained with the settings, and whose manifest has some other fields."""
    steps = [StepMetrics(n, loss + 20 - n, 1e-4, 1.0, 100 * n, 1.0, 1 << 30, 0.5) for n in range(1, 21)]
    config = run_config(settings or {}, seed)
    return ArmRun(name, seed, config, manifest_of(changes, seed), steps, [scores(answers)])


def test_files_and_figures(tmp_path):
    """Catches: an arm left out, the difference taken the wrong way round, a mean over all of the loss curve."""  # noqa: E501
    plain = {"adapter.dora": False, "adapter.targets": ["q_proj", "v_proj"]}
    runs = [arm("qlora", "TFFFFF", settings=plain), arm("qdora", "TTTTFF", loss=0.5)]
    report = write_report(tmp_path, runs, {"base": [scores("FFFFFT")]})
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(report))
    assert report["reference"] == "qlora"
    assert "difference" not in report["arms"]["qlora"]["tasks"]["gsm8k"]
    entry = report["arms"]["qdora"]["tasks"]["gsm8k"]
    assert entry["difference"]["points"] == pytest.approx(50)
    assert entry["difference"]["p_value"] == pytest.approx(0.25)
    assert report["arms"]["qdora"]["final_loss"] == pytest.approx((1.5 + 0.5) / 2)
    assert report["arms"]["qlora"]["tokens_per_second"] == pytest.approx(100 * 210 / 10)
    page = (tmp_path / "report.md").read_text()
    for words in ("# qlora against qdora", "1,234,567", "66.7 ± 19.2", "+50.0", "0.250", "4,321", "0.50"):
        assert words in page, words
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines()]
    assert ["trained", "nf4 + lora", "nf4 + lora + dora"] in cells
    assert ["adapter.dora", "false", "true"] in cells
    assert report["differences"]["adapter.targets"]["qlora"] == ["q_proj", "v_proj"]
    assert report["differences"].keys() == plain.keys()
    assert "initial A" in page
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_seeds_are_averaged(tmp_path):
    """Catches: one seed reported for all, seeds of different arms paired across each other."""
    runs = [arm("a", "TFFF", 0), arm("b", "TTTF", 0), arm("a", "FFFF", 1), arm("b", "TTTT", 1)]
    report = build_report(runs, {"base": [scores("FFFF")]})
    assert report["seeds"] == [0, 1]
    assert report["arms"]["b"]["tasks"]["gsm8k"]["by_seed"] == [0.75, 1.0]
    assert report["arms"]["b"]["tasks"]["gsm8k"]["score"] == pytest.approx(0.875)
    assert report["arms"]["b"]["tasks"]["gsm8k"]["difference"]["points"] == pytest.approx(75)


@pytest.mark.parametrize("fact", CONDITIONS)
def test_other_conditions_are_refused_by_name(fact):
    """Catches: arms compared that did not see the same base, data, order, steps or initial A."""
    results = [arm("a", "TF"), arm("b", "TF", **{fact: "other"})]
    with pytest.raises(InputError, match=rf"arms 'a' and 'b' differ in {fact}: .*'other'"):
        build_report(results, {})
    build_report([arm("a", "TF"), arm("b", "TF", trainable_parameters=5)], {})


def test_what_differs_is_not_called_the_same(tmp_path):
    """Catches: a page that says "same initial A" of arms of two ranks, or one base of two."""
    results = [
        arm("r8", "TF", settings={"adapter.r": 8}),
        arm("r64-16bit", "TF", settings={"model.quantization": "none"}, initial_a="other"),
    ]
    bases = {"base of r8": [scores("FF")], "base of r64-16bit": [scores("FT")]}
    report = write_report(tmp_path, results, bases)
    assert "initial_a" not in report["conditions"]
    page = (tmp_path / "report.md").read_text()
    assert "initial A" not in page
    assert "base of r8, no adapter" in page
    assert "base of r64-16bit, no adapter" in page
    assert report["bases"]["base of r64-16bit"]["gsm8k"]["score"] == 0.5


def untrained(name: str, answers: str, settings: dict | None = None) -> ArmRun:
    """An arm whose base model was scored, with the fields of a manifest that do not follow from training."""
    manifest = manifest_of({})
    for field in ("batch_order", "steps", "initial_a", "trainable_parameters"):
        del manifest[field]
    del manifest["base"]["parameters"]
    return ArmRun(name, 0, run_config(settings or {}), manifest, (), [scores(answers)], train=False)


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2)])
def test_an_arm_that_is_not_trained_is_reported_with_its_scores(tmp_path, order):
    """Catches: a report that fails without steps; one run taken for one of several seeds; trained arms that
    are no longer held against each other behind an untrained one."""
    shown = {"evaluation.max_new_tokens": 9}
    arms = [untrained("zero", "TFFF"), arm("a", "TTFF"), untrained("longer", "TTTF", shown)]
    runs = [*(arms[i] for i in order), arm("a", "TTTF", seed=1)]
    grid = [GridPoint("a", {"training.learning_rate": 1e-3}, 3, 4, True, "runs/a")]
    report = write_report(tmp_path, runs, {"base": [scores("TFFF")]}, grid)
    assert report["arms"]["longer"]["tasks"]["gsm8k"]["score"] == pytest.approx(0.75)
    points = [report["arms"][name]["tasks"]["gsm8k"].get("difference") for name in ("zero", "a")]
    other = next(entry for entry in points if entry is not None)
    assert other["points"] == pytest.approx(37.5 if order[0] == 0 else -37.5)
    assert report["arms"]["zero"]["trained"] == "nf4, not trained"
    assert report["grid"][0]["settings"] == {"training.learning_rate": 1e-3}
    assert {"batch_order", "steps", "initial_a"} <= report["conditions"].keys()
    page = (tmp_path / "report.md").read_text()
    assert "nf4, not trained" in page
    assert "zero" not in page.split("## Cost")[1]
    other = arm("b", "TFTF", batch_order="other")
    with pytest.raises(InputError, match="arms 'a' and 'b' differ in batch_order"):
        build_report([*runs, other], {})


def test_only_untrained_arms_make_a_report_too(tmp_path):
    """Catches: a plot or a page that needs at least one trained arm."""
    runs = [untrained("zero", "TFFF"), untrained("longer", "TTTF", {"evaluation.max_new_tokens": 9})]
    report = write_report(tmp_path, runs, {})
    assert report["arms"]["longer"]["tasks"]["gsm8k"]["difference"]["points"] == pytest.approx(50)
