"""The command `estimate`: what it prints, writes and refuses."""

from __future__ import annotations

import json

import pytest

from qdora.cli import run_command
from qdora.planner.report import Part
from tests.tiny import tiny_config

RUN = """
model: {path: PATH, dtype: bfloat16}
adapter: {r: 4, targets: [q_proj]}
data:
  train: {source: synthetic, count: 8, split: train}
  test: {source: synthetic, count: 8, split: test}
  max_length: 32
training: {max_steps: 2, batch_size: 8}
output: {dir: runs/x}
"""


@pytest.fixture
def words(tmp_path) -> list[str]:
    """Of a run of one layer, whose model folder has a configuration and no weights."""
    tiny_config(num_hidden_layers=1).save_pretrained(tmp_path / "model")
    (tmp_path / "run.yaml").write_text(RUN.replace("PATH", str(tmp_path / "model")))
    return ["--config", str(tmp_path / "run.yaml")]


def test_every_kind_is_printed_and_they_add_up(words, tmp_path, capsys):
    """Catches: a kind without a row, a total of other rows, a file that says something else."""
    out = tmp_path / "figures.json"
    assert run_command("estimate", [*words, "--gpus", "2", "--gpu-memory", "24GiB", "--json", str(out)]) == 0
    shown = capsys.readouterr().out
    assert all(any(line.startswith(part.value) for line in shown.splitlines()) for part in Part)
    assert "nf4 + lora + dora, r 4, bfloat16, 2 GPUs, FSDP; 4 x 32 tokens at once" in shown
    assert "fits in 24.00 GiB (2.00 GiB set aside)" in shown
    figures = json.loads(out.read_text())
    assert figures["fits"] is True
    assert figures["proposals"] == []
    assert sum(size for part, size in figures["peak"].items() if part != "total") == figures["peak"]["total"]
    assert figures["micro_batch"] == [4, 32]
    assert (
        figures["sent_bytes"]
        == (figures["collectives"]["all-gather"] + figures["collectives"]["reduce-scatter"]) // 2
    )


def test_a_run_that_does_not_fit_gets_proposals(words, capsys):
    """Catches: a verdict without a way out, or the memory that is set aside forgotten."""
    assert run_command("estimate", [*words, "--gpu-memory", "1KiB", "--reserve", "1B"]) == 0
    shown = capsys.readouterr().out
    assert "1 GPU, each with the whole model; 8 x 32 tokens at once" in shown
    assert "does not fit in 1.00 KiB (1 B set aside)" in shown
    assert "training.gradient_checkpointing=true" in shown
    assert "nothing here is enough" in shown
    assert (
        run_command(
            "estimate",
            [*words, "--gpu-memory", "1GiB", "--reserve", "2GiB", "--set", "training.batch_size=1"],
        )
        == 0
    )
    assert "does not fit in 1.00 GiB (2.00 GiB set aside)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus", "0"], "--gpus 0; allowed: 1 or more"),
        (
            ["--gpu-memory", "24 potatoes"],
            "--gpu-memory '24 potatoes': expected a size above 0 with its unit",
        ),
        (["--reserve", "much"], "--reserve 'much'"),
        (["--gpus", "3"], "training.batch_size 8 does not divide over 3 processes x 1 micro-batches"),
        (
            ["--gpus", "4", "--set", "training.gradient_accumulation=4"],
            "allowed: multiples of 16, or training.gradient_accumulation 1, 2",
        ),
        (["--plot", "x.png"], "--plot goes with --scaling"),
        (["--architecture", "nowhere"], "nowhere: not a model folder"),
        (["--set", "adapter.r=65"], "adapter.r is 65, larger than the smaller side"),
        (["--accelerate-config", "nowhere.yaml"], "--accelerate-config nowhere.yaml: cannot be used"),
    ],
)
def test_bad_input_is_one_sentence(words, capsys, options, message):
    """Catches: a traceback, or figures, for something that cannot be."""
    assert run_command("estimate", [*words, *options]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.err.count("\n") == 1
    assert shown.out == ""


def test_scaling_is_printed_for_every_number_of_gpus(words, tmp_path, capsys):
    """Catches: a table without a scheme or a link, a plot that is not written."""
    plot = tmp_path / "plot.png"
    assert run_command("estimate", [*words, "--scaling", "--plot", str(plot)]) == 0
    shown = capsys.readouterr().out
    for scheme in ("4-bit base + adapter", "16-bit base + adapter", "16-bit, all trained"):
        rows = [line.split()[-5] for line in shown.splitlines() if line.startswith(scheme)]
        assert rows == ["2", "8", "64", "1024"]
    assert plot.is_file()
