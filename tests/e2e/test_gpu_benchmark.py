"""The stages of `benchmark gpu` that run the real commands, on the CPU over gloo."""

from __future__ import annotations

import json

import pytest

from qdora.benchmark.gpu import commands
from qdora.cli import run_command
from tests.tiny import write_tiny_gguf

pytestmark = pytest.mark.e2e


def test_sharded_runs_and_marked_tests(tmp_path, monkeypatch):
    """Catches: launch files, options or environment with which a stage's processes do not start; a stage that
    fails in silence."""
    file = tmp_path / "gpu.json"
    monkeypatch.setattr(commands, "STEPS", 4)
    assert run_command("benchmark", ["gpu", "--json", str(file), "--stages", "fsdp,tests"]) == 0
    records = json.loads(file.read_text())["stages"]
    assert [(r["stage"], r["status"]) for r in records] == [("fsdp", "done"), ("tests", "done")]
    fsdp, tests = (record["figures"] for record in records)
    assert [(row["run"], row["ok"]) for row in fsdp["fsdp"]] == [("fsdp", True), ("offload", True)]
    assert (tests["failure"], tests["error"]) == (0, 0)
    assert tests["skipped"] + tests["passed"] > 0


def test_the_demo_runs_on_the_given_file(tmp_path, monkeypatch):
    """Catches: a demo of another model, in the checkout's own folder, or whose scores are not found."""

    def execute(setup, command):
        assert run_command("demo", command[command.index("demo") + 1 :]) == 0

    monkeypatch.setattr(commands, "execute", execute)
    file, model = tmp_path / "gpu.json", write_tiny_gguf(tmp_path / "tiny.gguf", context=1024)
    assert (
        run_command("benchmark", ["gpu", "--json", str(file), "--stages", "demo", "--model", str(model)]) == 0
    )
    [record] = json.loads(file.read_text())["stages"]
    figures = record["figures"]
    assert (figures["of"], figures["agrees"], figures["exact match after"]) == (4, False, 0)
    assert {path.name for path in tmp_path.iterdir()} == {model.name, file.name}
