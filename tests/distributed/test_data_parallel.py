"""Two processes share a batch and compute what one would."""

from __future__ import annotations

import json
import socket

import pytest
from safetensors.torch import load_file

from qdora.cli import run_command
from tests.e2e.runs import finish, metrics, start, tiny_tree, write_config

pytestmark = pytest.mark.distributed


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


@pytest.mark.parametrize("packing", ["none", "batch"])
def test_two_processes_equal_one(tmp_path, tiny_model_folder, packing):
    """Catches: a mean of means over ranks, gradients summed twice or in bf16, a file written by every rank,
    a short last batch that stops one rank, predictions lost or doubled between ranks;
    joined sequences that compute something else than padded ones."""
    runs = {}
    for count in (1, 2):
        folder = tmp_path / str(count)
        folder.mkdir()
        tree = tiny_tree(folder, tiny_model_folder, max_steps=15, gradient_accumulation=2)
        tree["adapter"] |= {"dropout": 0.0, "dtype": "float32"}
        tree["data"]["train"]["limit"] = 90  # the 12th batch holds two examples: one for each rank, or none
        tree["evaluation"]["every"] = 7
        tree["data"]["packing"] = packing if count == 2 else "none"
        runs[count] = write_config(folder, tree)
    assert run_command("train", ["--config", runs[1]]) == 0
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    finish(start(*launch, "launch/train.py", "--config", runs[2]), timeout=240)
    one, two = metrics(tmp_path / "1" / "run"), metrics(tmp_path / "2" / "run")
    assert len(two) == 15
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
        assert b["tokens"] == a["tokens"]
    ours = load_file(tmp_path / "2" / "run" / "adapter" / "adapter_model.safetensors")
    for name, expected in load_file(tmp_path / "1" / "run" / "adapter" / "adapter_model.safetensors").items():
        assert float((ours[name] - expected).norm() / expected.norm()) < 1e-3, name
    assert json.loads((tmp_path / "2" / "run" / "manifest.json").read_text())["processes"] == 2
