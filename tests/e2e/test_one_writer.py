"""One process writes a run, a folder of reports or an export; where it cannot, that is found out first."""

from __future__ import annotations

import json
import signal
import time

import pytest
import yaml

from qdora.cli import run_command
from qdora.commands import export as export_command
from qdora.commands import train as train_command
from qdora.evaluation import evaluate as evaluation
from qdora.export import job
from qdora.output import locked
from qdora.run import RunDirectory

from .runs import finish, metrics, start, tiny_tree, write_config

pytestmark = pytest.mark.e2e


def test_two_runs_at_once_in_one_new_folder(tmp_path, tiny_model_folder):
    """Catches: two runs that write one metrics.jsonl and remove each other's checkpoints, with code 0."""
    config = write_config(tmp_path, tiny_tree(tmp_path, tiny_model_folder, max_steps=30, save_every=2))
    both = [start("launch/train.py", "--config", config) for _ in range(2)]
    outputs = {p.communicate(timeout=240)[0]: p.returncode for p in both}
    assert sorted(outputs.values()) == [0, 2], outputs
    refused = next(text for text, code in outputs.items() if code == 2)
    # The later one may also come when the first has ended.
    assert (
        any(f"is in use by process {p.pid} on " in refused for p in both) or "already holds a run" in refused
    )
    assert [m["step"] for m in metrics(tmp_path / "run")] == list(range(1, 31))
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_run_in_progress_is_left_alone_and_goes_on_after_kill_9(tmp_path, tiny_model_folder, capsys):
    """Catches: a live run overwritten, resumed, scored or exported; one locked for ever by a dead process."""
    config = write_config(tmp_path, tiny_tree(tmp_path, tiny_model_folder, max_steps=4000, save_every=5))
    run, process = tmp_path / "run", start("launch/train.py", "--config", config)
    try:
        deadline = time.monotonic() + 240
        while not (run / "checkpoints" / "step-5").exists():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        for words in ([], ["--resume"], ["--set", "output.overwrite=true"]):
            assert run_command("train", ["--config", config, *words]) == 2
            assert f"output.dir {run} is in use by process {process.pid} on " in capsys.readouterr().err
        (run / "adapter").mkdir()
        (run / "adapter" / "adapter_model.safetensors").write_bytes(b"")
        for command in (["evaluate"], ["export", "--output", str(tmp_path / "out")]):
            assert run_command(command[0], [*command[1:], "--run", str(run)]) == 2
            assert f"--run {run} is in use by process {process.pid}" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
        assert not (run / "evaluation").exists()
        assert run_command("evaluate", ["--run", str(run), "--base-only", "--limit", "1"]) == 0
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    steps = ["--set", f"training.max_steps={len(metrics(run)) + 2}"]
    assert "resuming after" in finish(start("launch/train.py", "--config", config, "--resume", *steps))
    assert [m["step"] for m in metrics(run)] == list(range(1, len(metrics(run)) + 1))
    assert not (run / ".lock").exists()


def test_reports_and_exports_have_one_writer(tmp_path, trained, capsys):
    """Catches: the scores of one evaluation with the predictions of another; parallel tasks refused."""
    run, reports = ["--run", str(trained / "run")], tmp_path / "reports"
    words = [*run, "--output", str(reports)]
    with locked(reports / ".reports.lock", "it"):
        assert run_command("evaluate", words) == 2
        assert run_command("evaluate", [*words, "--task", "sums"]) == 2
    with locked(tmp_path / ".out.lock", "it"):
        assert run_command("export", [*run, "--output", str(tmp_path / "out")]) == 2
    with locked(reports / ".sums.lock", "it"):
        assert run_command("evaluate", [*words, "--task", "sums"]) == 2
        assert run_command("evaluate", [*words, "--task", "other"]) == 2
    error = capsys.readouterr().err
    assert error.count("is in use by this process") == 4
    assert "--task 'other': the test set has none" in error
    assert list(tmp_path.iterdir()) == []


def test_a_comparison_has_one_writer(tmp_path, tiny_model_folder, capsys):
    """Catches: two comparisons in one folder, an arm's live run cleared by an overwriting comparison."""
    write_config(tmp_path, tiny_tree(tmp_path, tiny_model_folder, max_steps=1), "base.yaml")
    compare = {
        "base": "base.yaml",
        "arms": [{"name": "qdora"}, {"name": "qlora", "set": {"adapter.dora": False}}],
        "output": {"dir": str(tmp_path / "both"), "overwrite": True},
    }
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(compare))
    words = ["--config", str(tmp_path / "compare.yaml")]
    arm = RunDirectory(tmp_path / "both" / "qlora-seed0")
    for held in (RunDirectory(tmp_path / "both"), arm):
        with held.locked():
            assert run_command("compare", words) == 2
        assert f"output.dir {held.path} is in use by this process" in capsys.readouterr().err
        assert not (tmp_path / "both").exists()


PLACES = {
    "below a file": ("{root}/file/new/run", "{root}/file is a file"),
    "a file": ("{root}/file", "{root}/file is a file"),
    "a dangling link": ("{root}/link", "{root}/link is a symbolic link to nothing"),
    "a null character": ("{root}/a\0b", "embedded null byte"),
    "a long name": ("{root}/" + "n" * 300, "File name too long"),
    "no disk": ("/proc/self/new", "No such file or directory"),
}


# An export replaces what has its name, where that was asked for.
ATTEMPTS = [(c, p) for c in ("train", "evaluate", "export") for p in PLACES]
ATTEMPTS = [
    attempt for attempt in ATTEMPTS if attempt not in (("export", "a file"), ("export", "a dangling link"))
]


@pytest.mark.parametrize(("command", "place"), ATTEMPTS)
def test_a_place_that_cannot_be_written_is_found_out_first(
    tmp_path, trained, monkeypatch, capsys, command, place
):
    """Catches: NotADirectoryError and its kin after the model has been loaded, trained or scored."""
    loaded = []
    for module in (train_command, evaluation, export_command):
        monkeypatch.setattr(module, "open_checkpoint", loaded.append)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    path, reason = (text.format(root=tmp_path) for text in PLACES[place])
    before = sorted(tmp_path.iterdir())
    if command == "train":
        tree = yaml.safe_load((trained / "config.yaml").read_text())
        tree["output"]["dir"] = path
        words = ["--config", write_config(trained, tree, "elsewhere.yaml")]
    else:
        words = ["--run", str(trained / "run"), "--output", path]
    assert run_command(command, words) == 2
    error = capsys.readouterr().err
    assert "cannot be written: " + reason in error
    assert "Traceback" not in error
    assert loaded == []
    assert sorted(tmp_path.iterdir()) == before


def test_an_export_in_the_way_is_found_out_first(tmp_path, trained, monkeypatch, capsys):
    """Catches: `already exists and is not empty` after a 70B model has been loaded and merged."""
    monkeypatch.setattr(job, "load_with_adapter", None)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert run_command("export", ["--run", str(trained / "run"), "--output", str(tmp_path / "out")]) == 2
    assert "already exists and is not empty" in capsys.readouterr().err


def test_a_folder_of_named_adapters_names_them(tmp_path, trained, capsys):
    """Catches: `adapter_config.json: no such file` where the adapters are one folder further down."""
    for name in ("math", "chat"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    words = ["--run", str(trained / "run"), "--adapter", str(tmp_path)]
    assert run_command("evaluate", words) == 2
    assert f"{tmp_path} holds adapters, name one of them: chat/, math/" in capsys.readouterr().err
