"""Sharded layers that are compiled, recomputed or both against plain ones, on two processes in one launch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from qdora.distributed.launch import FsdpSettings
from tests.distributed.sharded import FLOAT32, Case, run_case
from tests.tiny import cpu_context, write_tiny_model

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).parents[2]
TRAININGS = {
    "plain": {},
    "compiled": {"compile": True},
    "both": {"compile": True, "gradient_checkpointing": True, "checkpoint_every": 2},
}


def main(out: Path, models: Path) -> None:
    """Train each way; graphs are traced and differentiated, and computed by torch's operators."""
    torch.set_num_threads(1)
    torch.compile = partial(torch.compile, backend="aot_eager")
    adapter = FLOAT32 | {"targets": ("q_proj", "down_proj")}
    for name, training in TRAININGS.items():
        case = Case("tied", adapter, {"max_steps": 3} | training)
        run_case(out / name, models, case, cpu_context(FsdpSettings()))


def test_sharded_layers_compile_with_the_same_numbers(tmp_path):
    """Catches: a gathered parameter that is a constant of the graph, sizes of a sharded layer that are none,
    hooks that gather a layer within its graph or twice."""
    write_tiny_model(tmp_path / "models" / "tied")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = ["-m", "tests.distributed.test_compiled", str(tmp_path / "out"), str(tmp_path / "models")]
    done = subprocess.run(
        [sys.executable, *launch, *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    steps = {name: json.loads((tmp_path / "out" / name / "steps.json").read_text()) for name in TRAININGS}
    plain, *others = (torch.tensor(of_steps, dtype=torch.float64) for of_steps in steps.values())
    assert len(plain) == 3
    for other in others:
        torch.testing.assert_close(other, plain, rtol=1e-5, atol=0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
