"""Comparisons through the real command, on a tiny random LLaMA."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from qdora.cli import run_command
from qdora.evaluation.scores import read_reports
from qdora.run import RunDirectory

from .runs import ROOT, finish, metrics, start, tiny_tree, write_comparison, write_config

pytestmark = pytest.mark.e2e


def test_compare_writes_one_report_of_arms_that_differ_in_one_axis(tiny_model_folder, tmp_path, capsys):
    """Catches: arms with other data, order or initial A; a report without its parts; a copy of the comparison
    that cannot be repeated where the files that it came from are not."""
    arms = {"name": "qlora", "set": {"adapter.dora": False}}, {"name": "qdora"}
    words = write_comparison(tmp_path, tiny_model_folder, arms, seeds=[0, 1])
    assert run_command("compare", [*words, "--set", "set={model.path: /nowhere/at-all}"]) == 2
    assert not (tmp_path / "comparison").exists()
    assert run_command("compare", words) == 0
    folder = tmp_path / "comparison"
    written = {"report.html", "report.json", "report.md", "comparison.png"}
    written |= {"scores.csv", "differences.csv", "answers.csv"}
    assert written <= {p.name for p in folder.iterdir()}
    report = json.loads((folder / "report.json").read_text())
    assert report["arms"].keys() == {"qlora", "qdora"}
    assert report["arms"]["qdora"]["tasks"]["sums"]["difference"]["seeds"] == "paired"
    extra = report["arms"]["qdora"]["trainable_parameters"] - report["arms"]["qlora"]["trainable_parameters"]
    assert extra == 2 * (64 + 32 + 32 + 64 + 96 + 96 + 64)
    assert "| qdora" in (folder / "report.md").read_text()
    assert report["differences"] == {"adapter.dora": {"qlora": False, "qdora": True}}
    assert {"base.fingerprint", "batch_order", "steps", "initial_a"} <= report["conditions"].keys()
    assert run_command("compare", words) == 2
    assert "already holds a comparison" in capsys.readouterr().err
    (tmp_path / "base.yaml").unlink()
    assert run_command("compare", ["--config", str(folder / "compare.yaml"), "--resume"]) == 0


def test_dora_on_16_bits_against_qdora(tiny_model_folder, tmp_path):
    """Catches: arms that cannot differ in quantization; one base scored for both, or called the same."""
    write_comparison(tmp_path, tiny_model_folder, ())
    words = ["--config", str(ROOT / "configs" / "compare" / "dora-against-qdora.yaml")]
    words += ["--set", f"base={tmp_path / 'base.yaml'}", "--set", f"output.dir={tmp_path / 'comparison'}"]
    assert run_command("compare", [*words, "--set", "set={evaluation.limit: 4}"]) == 0
    report = json.loads((tmp_path / "comparison" / "report.json").read_text())
    assert report["reference"] == "dora"
    assert [arm["trained"] for arm in report["arms"].values()] == ["none + lora + dora", "nf4 + lora + dora"]
    assert report["differences"] == {"model.quantization": {"dora": "none", "qdora": "nf4"}}
    assert report["bases"].keys() == {"base of dora", "base of qdora"}
    assert {p.name for p in (tmp_path / "comparison" / "base").iterdir()} == {"dora", "qdora"}
    first, second = (metrics(tmp_path / "comparison" / f"{arm}-seed0") for arm in ("dora", "qdora"))
    assert [m["loss"] for m in first] != [m["loss"] for m in second]
    page = (tmp_path / "comparison" / "report.md").read_text()
    assert "same in all arms: base, " in page
    assert "initial A" in page


def test_ranks_rates_data_and_modes_in_one_comparison(tiny_model_folder, tmp_path, calls):
    """Catches: an arm refused for what it is to differ in; one base scored once for each arm."""
    full = {"training.mode": "full", "adapter": {"type": "none", "dora": False}, "model.quantization": "none"}
    arms = [
        {"name": "r4"},
        {"name": "r8-hot", "set": {"adapter.r": 8, "training.learning_rate": 5e-3}},
        {"name": "half", "set": {"data.train.limit": 48}},
        {"name": "vera", "set": {"adapter.type": "vera", "adapter.r": 16}},
        {"name": "pissa", "set": {"adapter.init": "pissa"}},
        {"name": "full", "set": full},
        {"name": "full-nf4", "set": {**full, "evaluation.quantization": "nf4"}},
    ]
    assert run_command("compare", write_comparison(tmp_path, tiny_model_folder, arms)) == 0
    report = json.loads((tmp_path / "comparison" / "report.json").read_text())
    assert report["differences"]["adapter.r"] == {
        **dict.fromkeys(("r4", "half", "pissa"), 4),
        "r8-hot": 8,
        "vera": 16,
        "full": 16,
        "full-nf4": 16,
    }
    assert report["differences"]["data.train.limit"]["half"] == 48
    assert report["bases"].keys() == {"base of r4, r8-hot, half, vera, pissa", "base of full, full-nf4"}
    assert calls["load_with_adapter"] == 2 + len(arms)
    assert report["conditions"].keys() & {"initial_a", "batch_order", "base.parameters"} == set()


def test_arms_that_differ_in_how_they_are_scored_are_trained_once(tiny_model_folder, tmp_path, calls, capsys):
    """Catches: one training made twice; a copy without its adapter, configuration or metrics, or one that is
    not said; a resumed comparison that takes it for another run's."""
    arms = [{"name": "qdora"}, {"name": "merged", "set": {"evaluation.weights": "merged"}}]
    words = write_comparison(tmp_path, tiny_model_folder, arms)
    assert run_command("compare", words) == 0
    assert calls["run"] == 1
    first, second = (RunDirectory(tmp_path / "comparison" / f"{arm['name']}-seed0") for arm in arms)
    assert metrics(second.path) == metrics(first.path)
    assert second.config().evaluation.weights == "merged"
    assert second.manifest() == first.manifest() | {"trained_in": "qdora-seed0"}
    name = "adapter_model.safetensors"
    assert (second.adapter / name).read_bytes() == (first.adapter / name).read_bytes()
    assert "merged-seed0 was trained once, as qdora-seed0" in capsys.readouterr().out
    assert run_command("compare", [*words, "--resume"]) == 0
    assert calls["run"] == 1


def test_the_copy_of_a_training_tells_its_own_run(tiny_model_folder, tmp_path, calls):
    """Catches: the card, the loss plot or the configuration of an arm that were made for another one, scores
    that are not in the card, a card that a person edited taken for another run's; a configuration that lacks
    what the training has put in force."""
    first = {"adapter": {"r": 2, "alpha": 6, "targets": ["q_proj"]}}
    write_config(tmp_path, tiny_tree(tmp_path, tiny_model_folder, max_steps=1) | first)
    assert run_command("train", ["--config", str(tmp_path / "config.yaml")]) == 0
    calls.clear()
    arms = [{"name": "one"}, {"name": "other", "set": {"evaluation.weights": "merged"}}]
    goes_on = {"adapter": {"from": str(tmp_path / "run" / "adapter")}}
    words = write_comparison(tmp_path, tiny_model_folder, arms, set=goes_on)
    assert run_command("compare", words) == 0
    assert calls["run"] == 1
    one, other = (RunDirectory(tmp_path / "comparison" / f"{arm['name']}-seed0") for arm in arms)
    assert (other.config().adapter.r, other.config().adapter.targets) == (2, ("q_proj",))
    assert other.config().output.dir == str(other.path)
    for path in (path for path in other.path.rglob("*") if path.suffix in (".json", ".yaml", ".jsonl")):
        assert path == other.manifest_file or one.path.name not in path.read_text(encoding="utf-8"), path
    assert other.loss_plot.read_bytes() != one.loss_plot.read_bytes()
    said = "The training was that of the run `one-seed0`"
    cards = [(run.adapter / "README.md").read_text(encoding="utf-8") for run in (one, other)]
    assert ["\n# one-seed0\n" in cards[0], "\n# other-seed0\n" in cards[1]] == [True, True]
    assert [said in card for card in cards] == [False, True]
    assert ["| `evaluation.weights` | `merged` |" in card for card in cards] == [False, True]
    for run, card in zip((one, other), cards, strict=True):
        [scores] = read_reports(run.evaluation)
        assert f"| {100 * scores.score:.1f}% |" in card
        assert f"| {scores.total} |" in card

    (one.adapter / "README.md").write_text("What a person says of the first.", encoding="utf-8")
    shutil.rmtree(other.adapter)
    shutil.rmtree(other.checkpoints, ignore_errors=True)
    assert run_command("compare", [*words, "--resume"]) == 0
    assert calls["run"] == 1
    assert (other.adapter / "README.md").read_text(encoding="utf-8") == cards[1]
    assert "a person says" in (one.adapter / "README.md").read_text(encoding="utf-8")


def test_resume_repeats_nothing_that_is_finished(tiny_model_folder, tmp_path, calls, capsys):
    """Catches: a finished arm trained, loaded or scored again; one that was cut short left as it is."""
    arms = [{"name": "a", "set": {"adapter.r": 2}}, {"name": "b"}]
    words = write_comparison(tmp_path, tiny_model_folder, arms)
    folder = tmp_path / "comparison"
    assert run_command("compare", words) == 0
    assert calls["run"] == calls["load_model"] == 2
    assert calls["load_with_adapter"] == 3  # one base, two arms
    report, curve = (folder / "report.json").read_bytes(), metrics(folder / "b-seed0")
    (folder / "report.json").unlink()

    calls.clear()
    assert run_command("compare", [*words, "--resume"]) == 0
    assert not calls
    assert (folder / "report.json").read_bytes() == report

    # Cut short after step 2, as a kill leaves it.
    run = folder / "b-seed0"
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "checkpoints" / "step-3")
    assert run_command("compare", [*words, "--resume"]) == 0
    assert (calls["run"], calls["_step"], calls["load_with_adapter"]) == (1, 1, 0)  # the same adapter again
    assert metrics(run) == curve

    # Scores that somebody has written over, and another number of questions.
    calls.clear()
    assert run_command("evaluate", ["--run", str(run), "--limit", "2"]) == 0
    assert run_command("compare", [*words, "--resume"]) == 0
    assert (calls["run"], calls["load_with_adapter"]) == (0, 1 + 1)
    assert json.loads((folder / "report.json").read_bytes())["arms"]["b"]["tasks"]["sums"]["total"] == 6
    calls.clear()
    assert run_command("compare", [*words, "--resume", "--set", "set={evaluation.limit: 3}"]) == 0
    assert (calls["run"], calls["load_with_adapter"]) == (0, 3)

    # Scores by earlier rules of reading answers.
    calls.clear()
    scored = json.loads((folder / "scored.json").read_bytes())
    for entry in scored.values():
        del entry["inputs"]["rules"]
    (folder / "scored.json").write_text(json.dumps(scored))
    assert run_command("compare", [*words, "--resume", "--set", "set={evaluation.limit: 3}"]) == 0
    assert (calls["run"], calls["load_with_adapter"]) == (0, 3)

    # Another seed and another arm; then an arm that has changed.
    calls.clear()
    added = write_comparison(
        tmp_path, tiny_model_folder, [*arms, {"name": "c", "set": {"adapter.r": 1}}], seeds=[0, 1]
    )
    assert run_command("compare", [*added, "--resume"]) == 0
    assert (calls["run"], calls["load_with_adapter"]) == (4, 1 + 6)
    calls.clear()
    capsys.readouterr()
    changed = write_comparison(
        tmp_path, tiny_model_folder, [{"name": "a", "set": {"adapter.r": 3}}, {"name": "b"}]
    )
    assert run_command("compare", [*changed, "--resume"]) == 2
    assert "arm 'a', seed 0" in (said := capsys.readouterr().err)
    assert "adapter.r was 2, is 3" in said
    assert not calls
    assert run_command("compare", [*changed, "--set", "output.overwrite=true"]) == 0
    assert calls["run"] == 2


def test_two_sharded_processes(tiny_model_folder, tmp_path, calls):
    """Catches: ranks that disagree on what is finished; pissa, which needs full weights, refused too late."""
    arms = [{"name": "qlora", "set": {"adapter.dora": False}}, {"name": "qdora"}]
    launch = [
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        "configs/accelerate/fsdp_cpu.yaml",
        "--quiet",
    ]
    pissa = [*arms, {"name": "pissa", "set": {"adapter.init": "pissa"}}]
    words = write_comparison(tmp_path, tiny_model_folder, pissa)
    refused = start(*launch, "launch/compare.py", *words)
    assert "arm 'pissa', seed 0: adapter.init: the update of" in finish(refused, code=1)
    assert not (tmp_path / "comparison").exists()
    words = write_comparison(tmp_path, tiny_model_folder, arms)
    finish(start(*launch, "launch/compare.py", *words))
    assert run_command("compare", [*words, "--resume"]) == 0  # one process: there is nothing left to do
    assert not calls
    more = write_comparison(tmp_path, tiny_model_folder, pissa)
    assert run_command("compare", [*more, "--resume"]) == 2  # two processes trained the others
    assert not calls


DOOMED = {
    "rank": ({"adapter.r": 65}, "arm 'b', seed 0: .*adapter.r.* 65"),
    "target": (
        {"adapter.targets": ["qproj"]},
        "arm 'b', seed 0: adapter.targets: 'qproj' matches no linear layer",
    ),
    "length": (
        {"data.max_length": 4096},
        "arm 'b', seed 0: data.max_length 4096 is longer than the model's context",
    ),
    "questions": (
        {"data.test.limit": 3},
        "arms 'a' and 'b' differ in data.fingerprints.test: .* no arms may",
    ),
}


@pytest.mark.parametrize("name", DOOMED)
def test_arms_that_cannot_be_compared_are_refused_before_a_weight_is_read(
    name, tiny_model_folder, tmp_path, calls, capsys
):
    """Catches: an arm that is refused when it has been trained, or when the arms before it have."""
    settings, message = DOOMED[name]
    words = write_comparison(tmp_path, tiny_model_folder, [{"name": "a"}, {"name": "b", "set": settings}])
    assert run_command("compare", words) == 2
    assert not calls
    assert not (tmp_path / "comparison").exists()
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(message, said), said
