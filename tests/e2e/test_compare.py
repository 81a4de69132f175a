"""Comparisons through the real command, on a tiny random LLaMA."""

from __future__ import annotations

import json

import pytest
import yaml

from qdora.cli import run_command

from .runs import tiny_tree, write_config

pytestmark = pytest.mark.e2e


def test_compare_writes_one_report_of_arms_that_differ_in_one_axis(tiny_model_folder, tmp_path, capsys):
    """Catches: arms with other data, order or initial A; a report without its parts."""
    tree = tiny_tree(tmp_path, tiny_model_folder, max_steps=4)
    tree["training"]["max_steps"] = 3
    write_config(tmp_path, tree, "base.yaml")
    comparison = {
        "base": "base.yaml",
        "arms": [{"name": "qlora", "set": {"adapter.dora": False}}, {"name": "qdora"}],
        "seeds": [0, 1],
        "set": {"evaluation.limit": 6},
        "output": {"dir": str(tmp_path / "comparison")},
    }
    config = tmp_path / "compare.yaml"
    config.write_text(yaml.safe_dump(comparison))
    wrong = ["--config", str(config), "--set", "set={model.path: /nowhere/at-all}"]
    assert run_command("compare", wrong) == 2
    assert not (tmp_path / "comparison").exists()
    assert run_command("compare", ["--config", str(config)]) == 0
    folder = tmp_path / "comparison"
    assert {"report.json", "report.md", "comparison.png"} <= {p.name for p in folder.iterdir()}
    report = json.loads((folder / "report.json").read_text())
    assert report["arms"].keys() == {"qlora", "qdora"}
    assert report["arms"]["qdora"]["tasks"]["sums"]["difference"].keys() == {"points", "stderr", "p_value"}
    extra = report["arms"]["qdora"]["trainable_parameters"] - report["arms"]["qlora"]["trainable_parameters"]
    assert extra == 2 * (64 + 32 + 32 + 64 + 96 + 96 + 64)
    assert "| qdora" in (folder / "report.md").read_text()
    assert run_command("compare", ["--config", str(config)]) == 2
    assert "already holds a comparison" in capsys.readouterr().err
    assert run_command("compare", ["--config", str(config), "--resume"]) == 0
