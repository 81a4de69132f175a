"""metrics.jsonl: written line by line, read back after a kill."""

from __future__ import annotations

import json

import pytest
import torch

from qdora.errors import InputError
from qdora.training.metrics import StepMetrics, append_metrics, keep_until, peak_memory, read_metrics


def step(number: int) -> StepMetrics:
    return StepMetrics(number, 1 / 3 + number, 1e-4 / number, 0.1, 10 * number, 99.5, 1 << 33, 0.25)


def test_round_trip_is_exact(tmp_path):
    """Catches: numbers rounded on the way to disk."""
    path = tmp_path / "metrics.jsonl"
    for number in (1, 2, 3):
        append_metrics(path, step(number))
    assert read_metrics(path) == [step(1), step(2), step(3)]
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_a_line_cut_short_is_left_out_and_written_again(tmp_path):
    """Catches: a killed run that cannot be resumed, or a new line glued to half a line."""
    path = tmp_path / "metrics.jsonl"
    for number in (1, 2, 3):
        append_metrics(path, step(number))
    whole = path.read_text()
    for cut in (1, 7, 60):
        path.write_text(whole[:-cut])
        assert read_metrics(path)[:2] == [step(1), step(2)]
        keep_until(path, 2)
        append_metrics(path, step(3))
        assert path.read_text() == whole


def test_keep_until_drops_what_is_trained_again(tmp_path):
    """Catches: steps that appear twice after a resume."""
    path = tmp_path / "metrics.jsonl"
    assert keep_until(path, 4) == 4
    assert not path.exists()
    for number in (1, 2, 3, 4):
        append_metrics(path, step(number))
    keep_until(path, 2)
    assert read_metrics(path) == [step(1), step(2)]
    keep_until(path, 0)
    assert read_metrics(path) == []


def test_peak_memory_is_in_bytes():
    """Catches: kilobytes reported as bytes."""
    assert 50 << 20 < peak_memory(torch.device("cpu")) < 1 << 40


def test_a_run_without_metrics_has_no_steps_and_a_folder_is_refused(tmp_path):
    """Catches: a traceback at the end of a resumed run whose metrics.jsonl was removed or replaced."""
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        read_metrics(tmp_path)


@pytest.mark.parametrize("damage", [b"\xff", b"{}", b"[[", b'{"step": "2"}'])
def test_a_damaged_line_costs_that_line_alone(tmp_path, damage):
    """Catches: all later steps lost, or a traceback after hours of training; and nobody told."""
    path = tmp_path / "metrics.jsonl"
    for number in (1, 2, 3, 4):
        append_metrics(path, step(number))
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], damage, *lines[2:]]))
    assert read_metrics(path) == [step(1), step(3), step(4)]
    assert keep_until(path, 3) == 1
    assert read_metrics(path) == [step(1), step(3)]


def test_a_folder_that_is_gone_is_said(tmp_path):
    """Catches: a traceback where a run directory was removed, or its device fails, in the middle of a run."""
    with pytest.raises(InputError, match=r"gone/metrics\.jsonl: cannot be written: No such file"):
        append_metrics(tmp_path / "gone" / "metrics.jsonl", step(1))
