"""The command table and the exit codes."""

from __future__ import annotations

import errno
import importlib
import json
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import pytest
import torch

from qdora import cli
from qdora.adapters import peft_layers
from qdora.benchmark import generate, peers, step
from qdora.benchmark import peft as benchmark_peft
from qdora.benchmark.layer import Shape
from qdora.cli import run_command
from qdora.commands import benchmark
from qdora.config_file import load_config
from qdora.errors import CheckpointError, InputError, InterruptedRunError
from qdora.experiments.schema import KINDS, schema_text
from tests.e2e.runs import tiny_tree, write_config
from tests.tiny import write_tiny_model

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_of_the_table_is_there(name, capsys):
    """Catches: a command that is listed and cannot be imported, or whose help fails."""
    command = importlib.import_module(f"qdora.cli.{name}")
    assert callable(command.add_arguments)
    assert callable(command.prepare)
    with pytest.raises(SystemExit) as stop:
        cli.run_command(name, ["--help"])
    assert stop.value.code == 0
    assert f"usage: qdora {name}" in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_help_lists_every_command(words, capsys):
    """Catches: a command that nobody finds."""
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert listed == list(cli.COMMANDS)


def test_an_unknown_command_suggests_the_nearest(capsys):
    """Catches: a typo that is answered with a traceback."""
    with pytest.raises(SystemExit) as stop:
        cli.main(["evalute"])
    assert stop.value.code == 2
    shown = capsys.readouterr()
    assert "unknown command 'evalute'; did you mean 'evaluate'?" in shown.err
    assert shown.out == ""


@pytest.mark.parametrize("kind", KINDS)
def test_schema_writes_that_of_the_kind(tmp_path, capsys, kind):
    """Catches: the schema of another kind of file, a file that is named and not written."""
    output = tmp_path / "new" / "s.json"
    assert run_command("schema", [kind]) == 0
    assert capsys.readouterr().out == schema_text(kind)
    assert run_command("schema", [kind, "--output", str(output)]) == 0
    assert output.read_text() == schema_text(kind)
    assert f"# yaml-language-server: $schema={output}" in capsys.readouterr().out


def fail_with(monkeypatch, error):
    """Let `train` raise an error."""

    def work():
        raise error

    command = types.SimpleNamespace(add_arguments=lambda parser: None, prepare=lambda parsed: work)
    monkeypatch.setitem(sys.modules, "qdora.cli.train", command)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (InputError("no such model"), 2, "qdora train: error: no such model"),
        (CheckpointError("step-3: corrupt"), 2, "qdora train: error: step-3: corrupt"),
        (InterruptedRunError("stopped after step 3", 143), 143, "qdora train: stopped after step 3"),
        (KeyboardInterrupt(), 130, "qdora train: interrupted"),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), 2, "error: /x/y: No space left on device"),
        (OSError(errno.EACCES, "Permission denied"), 2, "error: a file: Permission denied"),
    ],
)
def test_what_a_user_can_cause_is_one_line_and_an_exit_code(monkeypatch, capsys, error, code, words):
    """Catches: a traceback for bad input, a stopped run that reports success."""
    fail_with(monkeypatch, error)
    assert cli.run_command("train", []) == code
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1
    assert words in shown.err
    assert "Traceback" not in shown.err + shown.out


def test_a_reader_that_has_enough(tmp_path):
    """Catches: a traceback, or Python's own complaint at its end, behind `qdora configs | head -1`."""
    for command in ("configs", "schema"):
        line = f"set -o pipefail; {sys.executable} -m qdora {command} | head -c 9"
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False, cwd=ROOT)
        assert (done.returncode, done.stderr, len(done.stdout)) in [(0, "", 9), (141, "", 9)]


@pytest.mark.parametrize("error", [RuntimeError("ours"), ValueError("ours"), OSError(errno.EIO, "ours")])
def test_our_own_bugs_are_shown_in_full(monkeypatch, error):
    """Catches: a bug that is passed off as the user's."""
    fail_with(monkeypatch, error)
    with pytest.raises(type(error), match="ours"):
        cli.run_command("train", [])


def test_what_a_file_holds_does_not_flood_or_command_the_terminal(monkeypatch, capsys):
    """Catches: a megabyte of one value on the screen; an escape code of a file that clears it."""
    fail_with(monkeypatch, InputError(f"first {'x' * 70_000} last\x1b[2J\u202e\nbut this line"))
    assert run_command("train", []) == 2
    error = capsys.readouterr().err
    assert len(error) < 2200
    assert error.startswith("qdora train: error: first xxx")
    assert error.endswith("xxx last\\x1b[2J\\u202e\nbut this line\n")
    assert "characters ..." in error


def test_bad_input_of_a_real_command(tmp_path, capsys):
    """Catches: an error of the configuration that does not reach the exit code."""
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--config", str(tmp_path / "none.yaml")])
    assert stop.value.code == 2
    assert "none.yaml: no such configuration file" in capsys.readouterr().err


def test_train_without_a_configuration(tmp_path, monkeypatch, capsys):
    """Catches: `accelerate launch launch/train.py` refused, or without a word on what it trains; a quickstart
    that only a checkout has; a word from each rank."""
    trained = []
    monkeypatch.setattr("qdora.commands.train.train", lambda config, **_: trained.append(config))
    monkeypatch.chdir(tmp_path)
    assert run_command("train", ["--set", "training.max_steps=7"]) == 0
    assert capsys.readouterr().err == "no --config given: training the shipped quickstart, qdora:quickstart\n"
    monkeypatch.setenv("RANK", "1")
    assert run_command("train", []) == 0
    assert capsys.readouterr().err == ""
    steps = load_config(ROOT / "configs" / "quickstart.yaml").training.max_steps
    assert [config.training.max_steps for config in trained] == [7, steps]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--r", "0"], "--r 0"),
        (["--dropout", "1"], "--dropout 1.0"),
        (["--tile-mib", "0"], "--tile-mib 0.0; allowed: above 0"),
        (["--rounds", "0"], "--rounds 0; allowed: 1 or more"),
        (
            ["--shapes", "small", "--rounds", "1", "--r", "600"],
            "adapter.r is 600, larger than the smaller side",
        ),
    ],
)
def test_benchmark_refuses_bad_numbers(capsys, words, message):
    """Catches: a traceback where a benchmark is asked for something that cannot be."""
    assert run_command("benchmark", ["layer", *words]) == 2
    assert message in capsys.readouterr().err


def test_benchmark_layer_runs_and_writes_its_figures(tmp_path, capsys, monkeypatch):
    """Catches: a benchmark that no longer runs, or a file without the ratios that the table shows."""
    monkeypatch.setattr(benchmark, "SMALL", (Shape(64, 128, 16),))
    words = ["layer", "--shapes", "small", "--rounds", "1", "--json", str(tmp_path / "layer.json")]
    assert run_command("benchmark", words) == 0
    assert "qdora / peft qlora" in capsys.readouterr().out
    (layer,) = json.loads((tmp_path / "layer.json").read_text())["layers"]
    assert {(e["arm"], e["peer"]) for e in layer["ratios"]} >= {("qdora", "peft qdora"), ("qdora", "qlora")}
    assert all(e["ratio"] > 0 for e in layer["ratios"])


def test_benchmark_train_runs_on_the_model_that_is_configured(
    tmp_path, tiny_model_folder, capsys, monkeypatch
):
    """Catches: quantization settings of the model dropped by our arms or by PEFT's."""
    tree = tiny_tree(tmp_path, tiny_model_folder)
    tree["model"] |= {"block_size": 128, "double_quantization": False}
    built = []

    def remember(build):
        return lambda *words, **settings: built.append(build(*words, **settings)) or built[-1]

    monkeypatch.setattr(step, "_load", remember(step._load))
    monkeypatch.setattr(step, "peft_model", remember(step.peft_model))
    monkeypatch.setitem(peers.GEMM_SIDE, "cpu", 64)
    words = ["train", "--config", write_config(tmp_path, tree), "--rounds", "1"]
    assert run_command("benchmark", [*words, "--json", str(tmp_path / "train.json")]) == 0
    shown = capsys.readouterr().out
    assert "qdora / peft qlora: " in shown
    assert "goal" not in shown
    qdora, qlora, dense, *theirs = built
    for model in (qdora, qlora):
        base = model.get_submodule("model.layers.0.mlp.up_proj.base")
        assert (base.block_size, base.nested_absmax) == (128, None)
    assert dense.get_submodule("model.layers.0.mlp.up_proj.base").weight.is_floating_point()
    for peer in theirs:
        state = next(p for n, p in peer.named_parameters() if "up_proj.base_layer" in n).quant_state
        assert (state.blocksize, state.nested) == (128, False)
    report = json.loads((tmp_path / "train.json").read_text())["step"]
    assert report["seconds"].keys() == {"qdora", "qlora", "peft qdora", "peft qlora"}
    assert {(e["arm"], e["peer"]) for e in report["ratios"]} == set(step.PAIRS)
    assert report["gemm"]["share"] > 0


def test_benchmark_peft_times_the_same_trainer(tmp_path, tiny_model_folder, capsys, monkeypatch):
    """Catches: an arm that is not accelerated, or one that stays so in another's turn; the logits of all
    positions where those with labels were to be timed."""
    passes, logits = [], Counter()
    own, loss = peft_layers._forward, torch.nn.functional.cross_entropy

    def counted(source, *words, **more):
        logits[len(source)] += 1
        return loss(source, *words, **more)

    monkeypatch.setattr(peft_layers, "_forward", lambda *words: (passes.append(1), own(*words))[1])
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", counted)
    tree = tiny_tree(tmp_path, tiny_model_folder)
    words = ["peft", "--config", write_config(tmp_path, tree), "--rounds", "1", "--dtype", "float32"]
    assert run_command("benchmark", [*words, "--json", str(tmp_path / "peft.json")]) == 0
    out = capsys.readouterr().out
    assert "accelerated / peft: " in out
    assert "labelled / peft: " in out
    report = json.loads((tmp_path / "peft.json").read_text())["step"]
    assert report["accelerated_layers"] == report["dora_layers"] > 0
    # Of an arm: a warm-up and a round, each of one step and those that count.
    steps = 2 * (1 + benchmark_peft.STEPS)
    assert len(passes) == report["dora_layers"] * 2 * steps
    rows, tokens = report["batch"]
    assert logits == {rows * tokens: 2 * steps, report["labels"]: steps}


def test_benchmark_generate_compares_answers(tmp_path, capsys, monkeypatch):
    """Catches: arms that answer other questions, with another adapter, or at another length; adapters at
    the identity; a batch size that no arm tried."""
    # Rows of whole blocks: bitsandbytes' AVX512 kernel takes wrong scales for any other.
    sizes = {"intermediate_size": 128, "initializer_range": 0.3, "tie_word_embeddings": False}
    folder = write_tiny_model(tmp_path / "model", **sizes)
    config, seen = write_config(tmp_path, tiny_tree(tmp_path, folder)), []

    def without_fast_kernel(*words, **settings):
        model = peft_saved(*words, **settings)
        for module in model.modules():  # it rounds to bf16 on CPUs that have it
            module.support_avx512bf16_for_cpu = False
        seen.append(model)
        return model

    peft_saved = peers.peft_saved
    monkeypatch.setattr(generate, "peft_saved", without_fast_kernel)
    words = ["generate", "--config", config, "--rounds", "1", "--batch-sizes", "3,2", "--max-new-tokens", "7"]
    words += ["--examples", "4", "--word-problems", "3", "--json", str(tmp_path / "generate.json")]
    assert run_command("benchmark", words) == 0
    shown = capsys.readouterr().out
    figures = json.loads((tmp_path / "generate.json").read_text())["generate"]
    assert sum(figures["questions"].values()) == 7
    assert list(figures["arms"]) == [
        "qdora",
        "qdora, weights adapted",
        "peft qdora",
        "merged export",
        "transformers",
    ]
    assert all(
        arm["batch_size"] in (2, 3) and arm["tokens_per_second"] > 0 for arm in figures["arms"].values()
    )
    assert {(c["arm"], c["peer"]): c["equal_answers"] for c in figures["comparisons"]} == dict.fromkeys(
        generate.PAIRS, 7
    )
    assert "qdora / peft qdora: " in shown
    (peer,) = seen
    b_OR = [p for name, p in peer.named_parameters() if "lora_B" in name]
    assert b_OR
    assert all(float(p.abs().max()) > 0 for p in b_OR)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch-sizes", "8,x"], "--batch-sizes 8,x; allowed: numbers from 1 on"),
        (["--examples", "0"], "--examples 0"),
        (["--r", "4"], "benchmark generate has no --r; only layer"),
    ],
)
def test_benchmark_generate_refuses_bad_numbers(tmp_path, tiny_model_folder, capsys, words, message):
    """Catches: a traceback, or an option of another measurement that is ignored."""
    config = write_config(tmp_path, tiny_tree(tmp_path, tiny_model_folder))
    assert run_command("benchmark", ["generate", "--config", config, *words]) == 2
    assert message in capsys.readouterr().err
