"""The stages of `benchmark gpu` that start the real commands, on the CPU over gloo."""

from __future__ import annotations

import json

import pytest

from qdora.benchmark.gpu import commands
from qdora.cli import run_command
from tests.tiny import write_tiny_gguf

pytestmark = pytest.mark.e2e


def test_sharded_runs_tests_and_demo_run(tmp_path, capfd, monkeypatch):
    """Catches: launch files, options or environment with which a stage's processes do not start; a stage that
    fails in silence; a demo that is not run on the given file."""
    file, model = tmp_path / "gpu.json", write_tiny_gguf(tmp_path / "tiny.gguf", context=1024)
    monkeypatch.setattr(commands, "STEPS", 4)
    words = ["gpu", "--json", str(file), "--stages", "fsdp,tests,demo", "--model", str(model)]
    assert run_command("benchmark", words) == 0, capfd.readouterr().out
    records = json.loads(file.read_text())["stages"]
    assert [(r["stage"], r["status"]) for r in records] == [(n, "done") for n in ("fsdp", "tests", "demo")]
    fsdp, tests, demo = (record["figures"] for record in records)
    assert [(row["run"], row["ok"]) for row in fsdp["fsdp"]] == [("fsdp", True), ("offload", True)]
    assert (tests["failure"], tests["error"]) == (0, 0)
    assert tests["skipped"] + tests["passed"] > 0
    assert (demo["of"], demo["agrees"]) == (4, False)
