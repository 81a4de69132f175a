"""Checkpoints of several processes: shards in, the same bits out, for any number of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qdora.training.checkpoint import CheckpointWriter, list_checkpoints, newest_usable
from tests.distributed.checkpoints import POSITION, SETTINGS, make_optimizer, no_adapter, train
from tests.distributed.ranks import ROOT, SHARDED, ends, fork_ranks
from tests.forked import Forked
from tests.unit.training.checkpoints import alone, read_checkpoint, write_checkpoint

pytestmark = pytest.mark.distributed


def start(count: int, out: Path, part: str, **environment: str) -> list[Forked]:
    words = ["-m", "tests.distributed.checkpoints", str(out), part]
    return fork_ranks([words] * count, [ROOT] * count, **SHARDED, **environment)


def run_part(count: int, out: Path, part: str) -> list[dict[str, Any]]:
    for code, output in ends(start(count, out, part)):
        assert code == 0, output[-3000:]
        assert "Traceback" not in output
    return [json.loads((out / f"{part}-{rank}.json").read_text()) for rank in range(count)]


def test_two_then_one_then_four_processes(tmp_path):
    """Catches: shards lost, swapped or padded where rows do not divide; a scalar written by each; moments
    that stay behind; copies that the next step changes; an error of one process that the others do not hear
    of, or that leaves files; a checkpoint that is bad for one process and used by another."""
    zero, one = run_part(2, tmp_path, "two")
    assert zero["rows"] == {"five": 3, "three": 2, "eight": 4, "one": 1}
    assert one["rows"] == {"five": 2, "three": 1, "eight": 4, "one": 0}
    check_failures(zero, one)

    first = load_file(tmp_path / "two.safetensors")
    like = {name: torch.full_like(tensor, -1) for name, tensor in first.items()}
    run = tmp_path / "run"
    found = newest_usable(run, like, SETTINGS, alone(), print)
    assert found is not None
    assert (found.step, found.world_size) == (3, 2)
    assert_equal(found.tensors, first)
    # Full tensors are in the file that one process writes.
    alone_file = write_checkpoint(tmp_path / "alone", 3, first, SETTINGS) / "state-0.safetensors"
    assert (tmp_path / "full" / "step-3" / "state-0.safetensors").read_bytes() == alone_file.read_bytes()
    assert len(list((tmp_path / "full" / "step-3").glob("*.safetensors"))) == 1
    replicated = tmp_path / "replicated" / "step-3"
    assert [p.name for p in replicated.glob("*.safetensors")] == ["state-0.safetensors"]
    assert torch.equal(load_file(replicated / "state-0.safetensors")["master/x"], torch.arange(6.0))
    for step, expected in ((3, first), (4, load_file(tmp_path / "background.safetensors"))):
        background = read_checkpoint(tmp_path / "background" / f"step-{step}", like, SETTINGS)
        assert_equal(background.tensors, expected)

    single = make_optimizer(dtype=torch.bfloat16)
    single.load_state(found.tensors)
    for name, parameter in single.parameters.items():
        assert torch.equal(parameter.detach(), first[f"master/{name}"].bfloat16())
    train(single, range(3, 5))
    with CheckpointWriter(run, SETTINGS, alone(), keep=9) as writer:
        writer.save(5, single.state(), POSITION, no_adapter)

    for rank, facts in enumerate(run_part(4, tmp_path, "four")):
        assert (facts["step"], facts["processes"], facts["noticed"]) == (5, 1, True)
        assert facts["rows"] == {
            "five": [2, 2, 1, 0][rank],
            "three": [1, 1, 1, 0][rank],
            "eight": 2,
            "one": [1, 0, 0, 0][rank],
        }
    assert_equal(load_file(tmp_path / "four loaded.safetensors"), single.state())
    found = newest_usable(run, like, SETTINGS, alone(), print)
    assert found is not None
    assert (found.step, found.world_size) == (7, 4)
    assert_equal(found.tensors, load_file(tmp_path / "four.safetensors"))

    straight = make_optimizer()
    train(straight, range(7))
    for name, tensor in straight.state().items():
        # torch's fused AdamW rounds the last elements of a shard, fewer than a vector's, in another way.
        torch.testing.assert_close(found.tensors[name], tensor, rtol=1e-6, atol=1e-8)


def check_failures(zero: dict[str, Any], one: dict[str, Any]) -> None:
    files = ["adapter/adapter_model.safetensors", "state-0.safetensors", "state-1.safetensors", "state.json"]
    for facts in (zero, one):
        assert facts["written run"] == [f"step-3/{name}" for name in files]
        assert facts["written background"] == [f"step-{step}/{name}" for step in (3, 4) for name in files]
        assert facts["left"] == ["step-3"]
        assert facts["found"] == 3
        assert len(facts["said"]) == 1
        assert "state-1.safetensors: corrupt" in facts["said"][0]
        assert "trying the one before" in facts["said"][0]
        for bad in ("one rank", "own copy"):
            kind, words = facts[bad]
            assert kind == "CheckpointError"
            assert "corrupt" in words
        assert "rank 1: " in facts["one rank"][1]
        kind, words = facts["settings"]
        assert kind == "InputError"
        assert "rate = 0.001, this run has 2" in words
        for disk in ("disk", "disk in background"):
            kind, words = facts[disk]
            assert kind == "InputError"
            assert "state-1.safetensors: cannot be written: No space left on device" in words
            assert words.startswith("rank 1: ") == (facts is zero)
    assert zero["adapter"] == ["RuntimeError", "no adapter"]
    assert one["adapter"] == ["InputError", "rank 0: RuntimeError: no adapter"]


@pytest.mark.parametrize(("dies", "in_background"), [(1, "no"), (0, "yes")])
def test_a_process_killed_while_it_writes(tmp_path, dies, in_background):
    """Catches: survivors that wait for the dead one, or take its half-written checkpoint for one; the
    checkpoint before it gone; what it left in the way of the next save."""
    ended = ends(start(2, tmp_path, "killed", IN_BACKGROUND=in_background, DIES=str(dies)))
    assert ended[dies][0] == -9
    assert ended[1 - dies][0] == 1, ended[1 - dies][1]
    facts = json.loads((tmp_path / f"survivor-{1 - dies}.json").read_text())
    assert facts["lost"] is not None
    assert facts["seconds"] < 30
    directory = tmp_path / "killed"
    assert [p.name for p in list_checkpoints(directory)] == ["step-1"]
    straight = make_optimizer()
    train(straight, range(1))
    found = newest_usable(directory, straight.state(), SETTINGS, alone(), print)
    assert found is not None
    assert_equal(found.tensors, straight.state())
    write_checkpoint(directory, 2, straight.state(), SETTINGS)
    assert sorted(p.name for p in directory.iterdir()) == ["step-1", "step-2"]


def assert_equal(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor), name
