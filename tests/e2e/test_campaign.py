"""A short stage of each fault campaign; `python -m tools.campaign` runs the long ones."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tools.campaign import devices, kill

from .runs import ROOT, environment

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize("seed", [4, 6], ids=["one rank", "two sharded ranks"])
def test_killed_runs_reach_the_numbers_of_one_that_was_not(tmp_path, seed):
    """Catches: a write that a kill leaves half; an adapter, a metric, an evaluation or a checkpoint that
    differs after kills, of the resume too; leftovers; a rank that outlives another."""
    report = kill.run(3, seed, tmp_path)
    assert report.faults == []
    assert report.tried >= 3


def test_commands_on_failing_devices_end_in_order_and_go_on(tmp_path):
    """Catches: a traceback, a lost checkpoint or a leftover where a device is full, broken, read-only or
    gone, where the clock jumps, and where signals come in bursts."""
    report = devices.run(9, 0, tmp_path)
    assert report.faults == []
    assert report.tried == 9


def test_damaged_input_is_refused_or_read_right(tmp_path):
    """Catches: a traceback, an escape from the output directory, code run or memory filled by a damaged
    configuration, override, data file, adapter, checkpoint, model or run; a wrong result called right."""
    command = [sys.executable, "-m", "tools.campaign", "damage", "--count", "80"]
    report = tmp_path / "report.json"
    # A process of its own: cases are forked, and this one has threads.
    done = subprocess.run(
        [*command, "--json", str(report)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    found = json.loads(report.read_text())
    assert found["faults"] == []
    assert found["tried"] == 80
    assert done.returncode == 0
    outcomes = {name.partition(": ")[2] for name in found["counts"]}
    assert outcomes == {"refused", "right"}
