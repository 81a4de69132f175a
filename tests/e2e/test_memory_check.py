"""A run whose worst batch cannot fit ends before its base is loaded."""

from __future__ import annotations

import re

import pytest

from qdora.cli import run_command
from qdora.planner import check
from tests.distributed.ranks import SHARDED, ends, fork_ranks

from .runs import tiny_tree, write_config

pytestmark = pytest.mark.e2e

PRETEND = (
    "import sys; from qdora.planner import check; check.free_memory = lambda _: {}; "
    "from qdora.cli import main; main(sys.argv[1:])"
)


def test_a_batch_that_cannot_fit_is_refused_with_what_mends_it(
    tmp_path, tiny_model_folder, monkeypatch, capsys, calls
):
    """Catches: a run that ends for want of memory after its base was loaded, a proposal that does not mend
    it, one for the longest allowed example where the data has shorter ones, a run that nothing can start."""
    config = write_config(tmp_path, tiny_tree(tmp_path, tiny_model_folder, max_steps=1))
    monkeypatch.setattr(check, "free_memory", lambda _: 1_300_000)
    assert run_command("train", ["--config", config]) == 2
    said = capsys.readouterr().err
    assert re.search(r"the worst batch does not fit: 8 x \d\d tokens at once take \d.\d\d MiB", said), said
    assert "1.24 MiB of this machine are free" in said
    proposed = re.search(r"with --set (\S+) it takes", said)
    assert proposed, said
    assert proposed[1].startswith("training.gradient_accumulation=")
    assert calls["load_model"] == 0
    assert not (tmp_path / "run").exists()
    assert run_command("train", ["--config", config, "--set", proposed[1]]) == 0
    assert calls["load_model"] == 1
    again = ["--set", "output.overwrite=true", "--ignore-memory"]
    assert run_command("train", ["--config", config, *again]) == 0


def test_sharded_ranks_end_together(tmp_path, tiny_model_folder):
    """Catches: an estimate inside of a launch that ends in an assertion or hangs, one of the unsharded model,
    a rank that waits for another that was refused."""
    config = write_config(tmp_path, tiny_tree(tmp_path, tiny_model_folder, max_steps=1, batch_size=2))
    words = ["-c", PRETEND.format(1000), "train", "--config", config]
    for code, said in ends(fork_ranks([words] * 2, [tmp_path] * 2, **SHARDED), within=180):
        assert code == 2, said
        assert "the worst batch does not fit: 1 x " in said
        assert "1000 B for each process are free; no setting of the run alone mends that" in said
