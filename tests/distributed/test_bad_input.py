"""What goes wrong on one rank ends every rank, with a sentence, and nothing is written."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from qdora.run import RunDirectory
from tests.distributed.ranks import ends, start_ranks
from tests.e2e.runs import tiny_tree, write_config, write_questions
from tests.tiny import write_tiny_model

pytestmark = pytest.mark.distributed


@pytest.fixture
def two(tmp_path) -> list[Path]:
    """Two nodes, as it were: the same files in two folders, by the same relative names."""
    folders = []
    for rank in range(2):
        folder = tmp_path / f"node-{rank}"
        folder.mkdir()
        write_tiny_model(folder / "model")
        write_config(folder, tree(folder, tmp_path))
        folders.append(folder)
    return folders


def tree(folder: Path, shared: Path, **training: Any) -> dict[str, Any]:
    made = tiny_tree(folder, Path("model"), max_steps=2, **training)
    for part in ("train", "test"):
        made["data"][part]["path"] = f"{part}.jsonl"
    made["output"]["dir"] = str(shared / "run")
    return made


def assert_refused(folders: list[Path], *words: str) -> None:
    """Every rank ends with code 2 and these words, without a traceback; there is no run."""
    for code, output in ends(start_ranks([["train", "--config", "config.yaml"]] * len(folders), folders)):
        assert code == 2, output
        assert "Traceback" not in output
        for word in words:
            assert word in output
    assert not (folders[0].parent / "run").exists()


def test_other_configurations(two):
    """Catches: ranks that train with different learning rates, or one that waits for the other for ever."""
    write_config(two[1], tree(two[1], two[1].parent, learning_rate=0.5))
    assert_refused(two, "the configuration: rank 0 has ", "started with different input")


def test_other_data_and_another_model(two):
    """Catches: shards of two models in one, examples that are two different batches on two ranks."""
    write_questions(two[1] / "train.jsonl", 90)
    shutil.rmtree(two[1] / "model")
    write_tiny_model(two[1] / "model", seed=5)
    assert_refused(two, "the train data: rank 0 has ")


def test_a_shard_that_one_rank_cannot_read(two):
    """Catches: a rank that waits at a collective for one that has a truncated file."""
    path = two[1] / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert_refused(two, "model.safetensors", "truncated")


def test_a_run_that_another_process_writes(two):
    """Catches: ranks that wait for the main rank, which alone has found the run locked; two writers of it."""
    run = RunDirectory(two[0].parent / "run")
    with run.locked():
        for code, output in ends(start_ranks([["train", "--config", "config.yaml"]] * 2, two)):
            assert code == 2, output
            assert f"output.dir {run.path} is in use by process {os.getpid()} on " in output
        assert [path.name for path in run.path.iterdir()] == [".lock"]
    assert not run.path.exists()


def test_a_batch_that_does_not_divide(tmp_path, two):
    """Catches: a rank with more micro-batches than another, or one without any."""
    third = tmp_path / "node-2"
    shutil.copytree(two[0], third)
    assert_refused([*two, third], "training.batch_size 8 does not divide over 3 processes")
