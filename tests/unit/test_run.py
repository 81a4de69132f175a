"""The run directory and its manifest."""

from __future__ import annotations

import json
import os
import re

import pytest

from qdora import run as run_module
from qdora.cli import run_command
from qdora.commands import evaluate
from qdora.config import RunConfig
from qdora.config_file import check_config
from qdora.errors import InputError
from qdora.run import RunDirectory, make_manifest, newest_run


def make_config(folder) -> RunConfig:
    synthetic = {"source": "synthetic", "count": 5, "seed": 7}
    tree = {
        "model": {"path": "x"},
        "data": {"train": synthetic, "test": {**synthetic, "split": "test"}},
        "training": {"max_steps": 5, "seed": 3},
        "output": {"dir": str(folder)},
    }
    return check_config(tree, RunConfig, "test")


def started(folder) -> RunDirectory:
    run = RunDirectory(folder)
    run.start(make_config(folder), {"steps": 5})
    return run


def test_a_run_is_not_written_over(tmp_path):
    """Catches: a trained run lost to the same command given twice."""
    run = RunDirectory(tmp_path / "run")
    run.refuse_if_used(overwrite=False)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    run.refuse_if_used(overwrite=False)
    started(tmp_path / "run")
    with pytest.raises(InputError, match=r"already holds a run.*--resume.*overwrite=true"):
        run.refuse_if_used(overwrite=False)
    run.refuse_if_used(overwrite=True)


@pytest.mark.parametrize("piece", ["config.yaml", "metrics.jsonl", "checkpoints/step-1/state.json"])
def test_any_piece_of_a_run_counts(tmp_path, piece):
    """Catches: a run killed early that is taken for an empty folder."""
    (tmp_path / piece).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / piece).write_text("")
    assert RunDirectory(tmp_path).holds_run()


def test_clear_removes_the_runs_files_and_no_others(tmp_path):
    """Catches: a user's files deleted by an overwrite, or a stale checkpoint that survives it."""
    run = started(tmp_path)
    run.metrics_file.write_text("{}\n")
    run.loss_plot.write_bytes(b"png")
    scores = (run.evaluation, run.base_evaluation, run.validation, run.base_validation)
    for folder in (run.adapter, run.checkpoints / "step-1", *scores, run.analysis):
        folder.mkdir(parents=True)
        (folder / "x").write_text("x")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "model.safetensors").write_text("mine")
    run.clear()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["export", "notes.txt"]
    assert (tmp_path / "export" / "model.safetensors").is_file()
    run.clear()


def test_clear_removes_a_link_and_not_what_it_leads_to(tmp_path):
    """Catches: another run's checkpoints written over, because this run's folder was a link to them."""
    run = started(tmp_path / "run")
    other = tmp_path / "other"
    other.mkdir()
    (other / "x").write_text("theirs")
    run.checkpoints.symlink_to(other)
    run.clear()
    assert not run.checkpoints.is_symlink()
    assert (other / "x").read_text() == "theirs"


def test_the_configuration_and_manifest_come_back(tmp_path):
    """Catches: a resolved configuration that its own parser refuses."""
    run = started(tmp_path / "run")
    assert run.config() == make_config(tmp_path / "run")
    assert run.manifest() == {"steps": 5}
    with pytest.raises(InputError, match=r"not a run directory, it has no config\.yaml"):
        RunDirectory(tmp_path).config()
    with pytest.raises(InputError, match=r"manifest\.json: no such file"):
        RunDirectory(tmp_path).manifest()


@pytest.mark.parametrize("foreign", [None, "step-10.bak"])
def test_an_unfinished_run_names_its_newest_checkpoint(tmp_path, foreign):
    """Catches: step-9 named for newer than step-10, a copy of a checkpoint that ends in a traceback."""
    run = started(tmp_path)
    with pytest.raises(InputError, match=r"it was not finished$"):
        run.finished_adapter()
    for name in ("step-9", "step-10", foreign or "step-2"):
        (run.checkpoints / name).mkdir(parents=True)
    with pytest.raises(InputError, match=r"newest checkpoint is .*step-10$"):
        run.finished_adapter()
    run.adapter.mkdir()
    with pytest.raises(InputError):
        run.finished_adapter()
    (run.adapter / "adapter_model.safetensors").write_bytes(b"")
    assert run.finished_adapter() == run.adapter


def test_the_manifest_says_how_the_run_came_about(tmp_path):
    """Catches: a run that cannot be repeated: no versions, commit, machine or seeds."""
    manifest = make_manifest(make_config(tmp_path), world_size=2, fields={"steps": 5})
    assert json.loads(json.dumps(manifest)) == manifest
    assert {"python", "torch", "bitsandbytes", "transformers", "accelerate", "qdora"} <= set(
        manifest["versions"]
    )
    assert manifest["seeds"] == {"training": 3, "data": 7}
    assert (manifest["processes"], manifest["steps"]) == (2, 5)
    assert manifest["git_commit"] is None or len(manifest["git_commit"].partition("+")[0]) == 40
    assert {"processor", "threads", "cores", "gpus"} <= set(manifest["machine"])
    assert manifest["command"]
    assert manifest["started"].endswith("Z")


def started_at(folder, time: str | None, modified: int) -> RunDirectory:
    """A run whose manifest says `time` and whose configuration was written at `modified`."""
    run = RunDirectory(folder)
    run.start(make_config(folder), {} if time is None else {"started": time})
    os.utime(run.config_file, (modified, modified))
    return run


def test_the_newest_run_is_the_one_started_last(tmp_path):
    """Catches: a resumed or copied run taken for the newest, an arm of a comparison overlooked."""
    with pytest.raises(InputError, match=r"there is no run under .*/runs/; name a run with --run"):
        newest_run(tmp_path / "runs")
    first = started_at(tmp_path / "runs" / "b", "1970-01-01T00:01:40Z", modified=900)
    assert newest_run(tmp_path / "runs").path == first.path
    second = started_at(tmp_path / "runs" / "compare" / "a-seed0", "1970-01-01T00:03:20Z", modified=200)
    assert newest_run(tmp_path / "runs").path == second.path
    twin = started_at(tmp_path / "runs" / "c", "1970-01-01T00:03:20Z", modified=201)
    assert newest_run(tmp_path / "runs").path == twin.path
    (tmp_path / "runs" / "later-export").mkdir()
    assert newest_run(tmp_path / "runs").path == twin.path


@pytest.mark.parametrize("manifest", [None, "{", "[]", "{}", '{"started": 7}', '{"started": "yesterday"}'])
def test_a_run_without_a_usable_manifest_counts_by_the_time_of_its_files(tmp_path, manifest):
    """Catches: one damaged manifest that makes every command without --run end in a traceback."""
    old = started_at(tmp_path / "old", "1970-01-01T00:01:40Z", modified=900)
    damaged = started_at(tmp_path / "damaged", None, modified=300)
    damaged.manifest_file.unlink()
    if manifest is not None:
        damaged.manifest_file.write_text(manifest)
    assert newest_run(tmp_path).path == damaged.path
    os.utime(damaged.config_file, (50, 50))
    assert newest_run(tmp_path).path == old.path


@pytest.mark.parametrize("words", [["evaluate"], ["export", "--output", "out"]])
def test_commands_without_a_run_take_the_newest_and_say_which(tmp_path, monkeypatch, capsys, words):
    """Catches: a command that works on another run than it names, or silently, or says so on every rank."""
    monkeypatch.chdir(tmp_path)
    assert run_command(words[0], words[1:]) == 2
    assert "there is no run under runs/; name a run with --run" in capsys.readouterr().err
    started_at(tmp_path / "runs" / "old", "1970-01-01T00:01:40Z", modified=900)
    started_at(tmp_path / "runs" / "new", "1970-01-01T00:03:20Z", modified=900)
    assert run_command(words[0], words[1:]) == 2
    said, problem = capsys.readouterr().err.splitlines()
    assert said == "no --run given: runs/new is the newest run"
    assert "runs/new: the run has no adapter, it was not finished" in problem
    assert run_command(words[0], [*words[1:], "--run", "runs/old"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.setenv("RANK", "1")
    assert run_command(words[0], words[1:]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_evaluate_scores_the_newest_run_and_a_named_model_instead_of_it(tmp_path, monkeypatch, capsys):
    """Catches: the newest run's adapter put on a model that was named without a run."""
    monkeypatch.chdir(tmp_path)
    run = started_at(tmp_path / "runs" / "new", "1970-01-01T00:03:20Z", modified=900)
    run.adapter.mkdir()
    (run.adapter / "adapter_model.safetensors").write_bytes(b"")
    scored = []

    def evaluate_adapter(config, adapter, context, *, folder, task, split):
        assert split == "test"
        scored.append((config.model.path, adapter and str(adapter), folder and str(folder)))
        return []

    monkeypatch.setattr(evaluate, "evaluate_adapter", evaluate_adapter)
    assert run_command("evaluate", []) == 0
    assert "runs/new is the newest run" in capsys.readouterr().err
    assert run_command("evaluate", ["--base-only"]) == 0
    assert run_command("evaluate", ["--model", "m", "--data", "f.jsonl"]) == 0
    assert scored == [
        ("x", "runs/new/adapter", "runs/new/evaluation"),
        ("x", None, "runs/new/evaluation-base"),
        ("m", None, None),
    ]
    capsys.readouterr()
    assert run_command("evaluate", ["--model", "m"]) == 2
    assert "name a data file with --data" in capsys.readouterr().err


def test_the_validation_split_is_the_one_that_the_run_left_out(tmp_path, monkeypatch, capsys):
    """Catches: trained examples scored as if they had been left out; a limit of test questions on them; the
    reports of one set written over those of the other."""
    tree = make_config(tmp_path / "run").model_dump(mode="json")
    tree["data"]["validation"] = 2
    tree["evaluation"]["limit"] = 1
    run = RunDirectory(tmp_path / "run")
    run.start(check_config(tree, RunConfig, "test"), {})
    run.adapter.mkdir()
    (run.adapter / "adapter_model.safetensors").write_bytes(b"")
    scored = []

    def evaluate_adapter(config, adapter, context, *, folder, task, split):
        scored.append((split, config.evaluation.limit, folder.name))
        return []

    monkeypatch.setattr(evaluate, "evaluate_adapter", evaluate_adapter)
    words = ["--run", str(run.path), "--split", "validation"]
    for more in ([], ["--base-only"], ["--limit", "2"]):
        assert run_command("evaluate", [*words, *more]) == 0
    assert scored == [
        ("validation", None, "evaluation-validation"),
        ("validation", None, "evaluation-base-validation"),
        ("validation", 2, "evaluation-validation"),
    ]
    refused = {
        ("--data", "f.jsonl"): "--data names a test set",
        ("--set", "data.validation=3"): "--set changes data.validation, .* left out of training",
        ("--set", "data.train.seed=1"): "--set changes data.train, ",
        ("--set", "data.test.limit=1"): "--set changes data.test, ",
        ("--set", "data.validation=null"): "data.validation is null, so no examples were left out",
    }
    capsys.readouterr()
    for more, message in refused.items():
        assert run_command("evaluate", [*words, *more]) == 2
        assert re.search(message, capsys.readouterr().err)


def test_scores_of_another_adapter_are_not_the_runs(tmp_path, monkeypatch, capsys):
    """Catches: `--run R --adapter OTHER` writing OTHER's scores over R's own."""
    run = started(tmp_path / "run")
    other = tmp_path / "other"
    folders = []

    def evaluate_adapter(config, adapter, context, *, folder, task, split):
        folders.append(folder and folder.name)
        return []

    monkeypatch.setattr(evaluate, "evaluate_adapter", evaluate_adapter)
    words = ["--run", str(run.path), "--adapter"]
    for adapter in (other, run.path / "checkpoints" / "step-2" / "adapter"):
        assert run_command("evaluate", [*words, str(adapter)]) == 0
        assert "reports: none, the adapter is not the run's own; --output DIR" in capsys.readouterr().out
    for own in (run.adapter, run.best_adapter):
        assert run_command("evaluate", [*words, str(own.parent / "." / own.name)]) == 0
    assert folders == [None, None, "evaluation", "evaluation-best"]


def test_what_a_kill_left_of_a_removal_is_cleared(tmp_path):
    """Catches: the checkpoints of an earlier run that stay hidden for ever; a user's hidden files removed."""
    run = started(tmp_path)
    kept = {".env.template", ".config.yaml.original", ".adapter.previous/x", "config.yaml", "manifest.json"}
    for name in (".checkpoints.removed/step-2/state.json", ".evaluation.removed/x.json", *kept):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    run.clear_leftovers()
    assert {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()} == kept


@pytest.mark.parametrize("removed", range(10))
def test_a_run_killed_while_it_is_replaced_can_be_resumed(tmp_path, monkeypatch, removed):
    """Catches: checkpoints without the manifest that `--resume` asks for; an old adapter in a new run."""
    run = started(tmp_path)
    for path in (run.adapter, run.evaluation, run.base_evaluation, run.checkpoints / "step-2"):
        path.mkdir(parents=True)
    run.loss_plot.write_bytes(b"png")
    run.metrics_file.write_text("")
    left = [removed]

    def remove(path):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        real(path)

    real = run_module.remove
    monkeypatch.setattr(run_module, "remove", remove)
    with pytest.raises(KeyboardInterrupt):
        run.clear()
    if (run.checkpoints / "step-2").exists():
        run.record_resume(run.config(), 2)
        assert run.metrics_file.exists()
    if not run.checkpoints.exists():
        assert not run.adapter.exists()


def test_a_checkout_that_is_not_installed_has_versions(monkeypatch):
    """Catches: a traceback where the package is on the path but not installed."""
    found = run_module.importlib.metadata.version

    def version(name):
        if name == "qdora":
            raise run_module.importlib.metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(run_module.importlib.metadata, "version", version)
    versions = run_module.package_versions("peft")
    assert versions["qdora"] == "not installed"
    assert versions["peft"] == found("peft")
