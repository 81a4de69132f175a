"""Comparisons of `configs/paper` with `--small`, through the real command, on a tiny random LLaMA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from qdora.cli import run_command
from tests.tiny import write_tiny_model

from .runs import ROOT, metrics

pytestmark = pytest.mark.e2e


def compare_small(name: str, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Run a comparison with `--small` and settings on top; its report."""
    overlay = folder / "tiny.yaml"
    overlay.write_text(yaml.safe_dump({"set": settings}))
    words = [
        "--config",
        str(ROOT / "configs" / "paper" / f"{name}.yaml"),
        "--small",
        "--overlay",
        str(overlay),
    ]
    assert run_command("compare", [*words, "--set", f"output.dir={folder / 'comparison'}"]) == 0
    report: dict[str, Any] = json.loads((folder / "comparison" / "report.json").read_text())
    return report


def tiny(model: Path) -> dict[str, Any]:
    return {
        "model.path": str(model),
        "model.dtype": "float32",
        "training.max_steps": 2,
        "evaluation.max_new_tokens": 4,
    }


def test_table_1(tiny_model_folder, tmp_path):
    """Catches: arms of the paper that cannot be trained, scored or reported; half rank that is not half."""
    for task in ("ARC-Easy", "boolq", "openbookqa"):
        (tmp_path / "data" / task).mkdir(parents=True)
        for split, count in (("train", 9), ("test", 3)):
            rows = [
                {
                    "instruction": f"{task} {split} {i}?",
                    "input": "",
                    "output": "the correct answer is answer1",
                    "answer": "answer1",
                }
                for i in range(count)
            ]
            (tmp_path / "data" / task / f"{split}.json").write_text(json.dumps(rows))
    paths = {f"data.{split}.path": str(tmp_path / "data") for split in ("train", "test")}
    report = compare_small("table1-llama2-7b", tmp_path, tiny(tiny_model_folder) | paths)
    assert report["reference"] == "lora"
    assert report["differences"] == {
        "adapter.dora": {"lora": False, "dora-half": True, "dora": True},
        "adapter.r": {"lora": 32, "dora-half": 16, "dora": 32},
        "adapter.alpha": {"lora": 64.0, "dora-half": 32.0, "dora": 64.0},
    }
    for arm in report["arms"].values():
        assert {task: score["total"] for task, score in arm["tasks"].items()} == dict.fromkeys(
            ("ARC-Easy", "boolq", "openbookqa"), 3
        )


def test_figure_6(tmp_path):
    """Catches: full fine-tuning that starts with an adapter, or that trains otherwise where it is quantized
    to be scored."""
    model = write_tiny_model(tmp_path / "model", max_position_embeddings=1024)
    settings = tiny(model) | {"adapter.r": 4, "data.test.limit": 6}
    report = compare_small("figure6-llama3-8b", tmp_path, settings)
    trained = {name: arm["trained"] for name, arm in report["arms"].items()}
    assert trained["qlora"] == "nf4 + lora"
    assert trained["qdora"] == "nf4 + lora + dora"
    assert report["differences"]["evaluation.quantization"]["full-nf4"] == "nf4"
    full, quantized = (metrics(tmp_path / "comparison" / f"{name}-seed0") for name in ("full", "full-nf4"))
    assert full == quantized
    assert full != metrics(tmp_path / "comparison" / "qdora-seed0")
    assert (
        report["arms"]["full"]["trainable_parameters"] > 5 * report["arms"]["qdora"]["trainable_parameters"]
    )
