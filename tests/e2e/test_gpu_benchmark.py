"""The stages of `benchmark gpu` that run the real commands, on the CPU over gloo."""

from __future__ import annotations

import json

import pytest

from qdora.benchmark.gpu import commands
from qdora.cli import run_command
from qdora.commands import demo
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
    """Catches: a demo of another model, in the checkout's own run folder, or one whose scores are not found.

    Its four commands run in this process.
    """

    def in_this_process(title, command):
        script = next(i for i, word in enumerate(command) if word.startswith("launch/"))
        assert (
            run_command(command[script].removeprefix("launch/").removesuffix(".py"), command[script + 1 :])
            == 0
        )

    def execute(setup, command):
        assert run_command("demo", command[command.index("demo") + 1 :]) == 0

    monkeypatch.setattr(demo, "_step", in_this_process)
    monkeypatch.setattr(commands, "execute", execute)
    file, model = tmp_path / "gpu.json", write_tiny_gguf(tmp_path / "tiny.gguf", context=1024)
    assert (
        run_command("benchmark", ["gpu", "--json", str(file), "--stages", "demo", "--model", str(model)]) == 0
    )
    [record] = json.loads(file.read_text())["stages"]
    figures = record["figures"]
    assert (figures["of"], figures["agrees"], figures["exact match after"]) == (4, False, 0)
    assert {path.name for path in tmp_path.iterdir()} == {model.name, file.name}
