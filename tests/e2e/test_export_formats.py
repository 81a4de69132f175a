"""The formats of `export` by its command, on a finished run."""

from __future__ import annotations

import json

import pytest

from qdora import AdapterConfig, inject, load_base, save_adapter
from qdora.cli import run_command
from tests.tiny import tiny_bpe_tokenizer, write_tiny_model

pytestmark = pytest.mark.e2e


def test_nf4(trained, tmp_path, capsys):
    """Catches: an output folder left by an export that is refused; a requantized one that does not verify."""
    words = ["--run", str(trained / "run"), "--output", str(tmp_path / "out"), "--format", "nf4"]
    assert run_command("export", words) == 2
    said = capsys.readouterr().err
    assert "mlp.down_proj has rows of 96 weights, not a multiple of the block size 64" in said
    assert list(tmp_path.iterdir()) == []
    assert run_command("export", [*words, "--requantize", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "verified: plain transformers loads it" in shown
    assert "merged and quantized again, all weights together differ by" in shown
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_quant_type"] == "nf4"


def test_lora(trained, tmp_path, capsys):
    """Catches: a LoRA that `evaluate` and `export` do not read back, scores of one model under both names."""
    run, out = trained / "run", tmp_path / "out"
    words = ["--run", str(run), "--output", str(out), "--format", "lora", "--r", "3", "--score"]
    assert run_command("export", [*words, "--set", "evaluation.limit=2"]) == 0
    shown = capsys.readouterr().out
    assert "a LoRA of rank 3 that keeps " in shown
    assert "read back onto the quantized base: logits differ by " in shown
    assert "as this LoRA (" in shown
    assert json.loads((out / "adapter_config.json").read_text())["use_dora"] is False
    assert run_command("evaluate", ["--run", str(run), "--adapter", str(out), "--limit", "2"]) == 0


def test_gguf(trained, tmp_path, capsys):
    """Catches: a format that the command does not reach; a folder left by an export that is refused."""
    base = write_tiny_model(tmp_path / "base", vocab_size=320)
    tiny_bpe_tokenizer().save_pretrained(base)
    model, _ = load_base(str(base), dtype="float32")
    inject(model, AdapterConfig(r=4, alpha=12))
    save_adapter(model, tmp_path / "adapter")
    of_base = [
        "--model",
        str(base),
        "--adapter",
        str(tmp_path / "adapter"),
        "--output",
        str(tmp_path / "out"),
    ]
    assert run_command("export", [*of_base, "--format", "gguf", "--type", "q4_0", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "model-q4_0.gguf and Modelfile: " in shown
    assert "verified: read back, weights differ by " in shown
    assert "{{ range .Messages }}" in (tmp_path / "out" / "Modelfile").read_text()
    of_run = ["--run", str(trained / "run"), "--output", str(tmp_path / "none"), "--format", "gguf"]
    assert run_command("export", of_run) == 2
    assert "is WordLevel; in GGUF files: BPE" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format", "nf4", "--onto", "original"], "--onto is an option of --format merged, lora, gguf;"),
        (["--format", "gguf", "--dtype", "fp16"], "--format gguf takes --type, --onto, --quantize"),
        (["--format", "lora", "--r", "0"], "--format lora needs --r N, its rank, from 1 on; got 0"),
        (
            ["--requantize"],
            "--requantize is an option of --format nf4; --format merged takes --dtype",
        ),
        (["--device", "cuda:77"], "this machine has"),
        (["--format", "lora", "--r", "40"], "--r 40: larger than the smaller side of"),
    ],
)
def test_options(trained, tmp_path, capsys, words, message):
    """Catches: an option of another format that is ignored."""
    target = ["--run", str(trained / "run"), "--output", str(tmp_path / "out")]
    assert run_command("export", [*target, *words]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
