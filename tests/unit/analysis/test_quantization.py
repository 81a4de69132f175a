"""Errors of formats against float64, on inputs that a plain pass over each example alone gives."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from qdora.adapters.inject import adapted_layers, decoder_linears, inject
from qdora.adapters.peft_io import load_adapter
from qdora.analysis.quantization import (
    Errors,
    LayerErrors,
    calibration_examples,
    errors_of,
    layer_errors,
    medians,
    table,
)
from qdora.cli import run_command
from qdora.config_file import load_config
from qdora.data.tokenize import TokenizedExample
from qdora.errors import InputError
from qdora.models.load import load_base
from qdora.models.sources import open_checkpoint
from qdora.quant import Quantization
from qdora.quant import base as tiling
from tests.axes import adapter_config
from tests.tiny import write_tiny_model
from tests.unit.adapters.oracle import move_off_the_identity

from .runs import write_run

FORMATS = ("nf4", "fp4", "int8", "nf3", "nf2")
EXAMPLES = [TokenizedExample(list(range(4, 4 + n)), 2, f"x:{n}") for n in (9, 17, 5)]


def in_float64(w_OI: torch.Tensor, x_NI: torch.Tensor, name: str) -> Errors:
    """The errors by their definition."""
    w, x = w_OI.double(), x_NI.double()
    difference = w - Quantization(name).from_dense(w_OI).dense().double()
    return Errors(
        float(difference.norm() / w.norm()),
        float(difference.abs().max() / w.abs().max()),
        float((x @ difference.T).norm() / (x @ w.T).norm()),
    )


@pytest.mark.parametrize("tile_bytes", [4 << 20, 4 * 96 * 7])
def test_errors_are_those_of_float64(monkeypatch, tile_bytes):
    """Catches: the error of the last tile for that of the matrix, norms that are added without their squares,
    an absolute error, an output error with W transposed."""
    generator = torch.Generator().manual_seed(0)
    w_OI = torch.randn(50, 96, generator=generator) * torch.rand(50, 1, generator=generator)
    x_NI = torch.randn(31, 96, generator=generator) * torch.rand(96, generator=generator)
    expected = {name: in_float64(w_OI, x_NI, name) for name in FORMATS}
    monkeypatch.setitem(tiling.TILE_BYTES, "cpu", tile_bytes)
    got = errors_of(w_OI, x_NI, [Quantization(name) for name in FORMATS])
    assert list(got) == list(FORMATS)
    for name in FORMATS:
        assert got[name] == pytest.approx(expected[name], rel=1e-5)
    assert got["int8"].output < got["nf4"].output < got["nf3"].output < got["nf2"].output
    assert errors_of(torch.zeros(2, 64), x_NI[:, :64], [Quantization("nf3")]) == {"nf3": Errors(0, 0, 0)}


def test_every_layer_is_measured_on_its_own_inputs(tiny_model_folder: Path) -> None:
    """Catches: inputs of padding that count, inputs of the base without its adapter or of another layer, the
    weight of the base for the merged one, a layer that is left out, hooks that stay."""
    model, _ = load_base(str(tiny_model_folder), dtype="float32")
    inject(model, adapter_config(r=4, alpha=11.0, targets=("q_proj", "gate_proj", "down_proj")))
    for seed, layer in enumerate(adapted_layers(model).values()):
        move_off_the_identity(layer, seed)
    got = layer_errors(model, EXAMPLES, [Quantization("nf3")])
    layers = decoder_linears(model)
    assert got.keys() == layers.keys()
    assert len(got) == 14
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda _, args, y, name=name: inputs[name].append(args[0][0]))
    with torch.no_grad():
        for example in EXAMPLES:
            model(input_ids=torch.tensor([example.input_ids]))
    for name, layer in layers.items():
        assert len(inputs[name]) == len(EXAMPLES), "a hook of the measurement is still there"
        x_NI = torch.cat(inputs[name])
        assert got[name]["nf3"] == pytest.approx(
            in_float64(layer.merged(torch.float32), x_NI, "nf3"), rel=1e-4
        )


def test_medians_are_over_layers_and_ratios_layer_by_layer():
    """Catches: a ratio of medians, a mean, models or formats mixed."""
    found = [
        LayerErrors(model, f"layers.{i}.{module}", "nf4", Errors(0.1, 0.2, output))
        for model, outputs in (("base", (0.1, 0.2, 0.4)), ("a", (0.2, 0.2, 0.2)))
        for module in ("q_proj", "up_proj")
        for i, output in enumerate(outputs)
    ]
    rows = {(row["model"], row["module"]): row for row in medians(found)}
    assert rows["base", "q_proj"]["output"] == 0.2
    assert rows["base", "all"]["layers"] == 6
    assert "output_to_first" not in rows["base", "all"]
    assert rows["a", "up_proj"]["output_to_first"] == pytest.approx(1.0)  # of 2, 1 and 1/2
    text = table(medians(found))
    assert "10.00 / 20.00" in text
    assert "output error divided by that of base" in text
    alone = table(medians(found[:6]))
    assert "divided" not in alone


def test_the_command_compares_the_base_and_two_runs(tiny_model_folder, tmp_path, capsys):
    """Catches: a run measured without its adapter, or onto the weights that were not asked for; files that
    say something else than the table; a base that is quantized before it is measured."""
    for name, dora in (("lora", False), ("dora", True)):
        write_run(tmp_path / name, tiny_model_folder, dora=dora, seed=int(dora))
    words = ["analyze", "quantization", "--run", str(tmp_path / "lora"), "--run", str(tmp_path / "dora")]
    words += ["--formats", "nf4,nf2", "--examples", "3"]
    found = {}
    for onto in ("nf4", "original"):
        folder = tmp_path / "out" / onto
        assert run_command(words[0], [*words[1:], "--onto", onto, "--output", str(folder)]) == 0
        found[onto] = json.loads((folder / "figures.json").read_text())
        rows = list(csv.DictReader((folder / "errors.csv").open()))
        assert len(rows) == len(found[onto]["layers"]) == 3 * 14 * 2
        assert [float(row["output"]) for row in rows] == [row["output"] for row in found[onto]["layers"]]
        assert (folder / "errors.png").read_bytes().startswith(b"\x89PNG")
    assert "3 examples" in capsys.readouterr().out
    config = load_config(tmp_path / "lora" / "config.yaml")
    examples = calibration_examples(config, open_checkpoint(str(tiny_model_folder)), 3)
    assert found["nf4"]["tokens"] == sum(len(example.input_ids) for example in examples)
    for onto, model_name, quantization in (
        ("nf4", "base", "none"),
        ("nf4", "dora", "nf4"),
        ("original", "dora", "none"),
    ):
        settings = {entry["name"]: entry for entry in found[onto]["models"]}[model_name]
        assert settings["model"]["quantization"] == quantization
        model, _ = load_base(str(tiny_model_folder), quantization=quantization, dtype="float32")
        if model_name == "dora":
            load_adapter(model, tmp_path / "dora" / "adapter")
        expected = layer_errors(model, examples, [Quantization("nf2")])
        got = {
            r["layer"]: r for r in found[onto]["layers"] if (r["model"], r["format"]) == (model_name, "nf2")
        }
        for layer_name, errors in expected.items():
            assert got[layer_name]["output"] == pytest.approx(errors["nf2"].output, rel=1e-5)
            assert got[layer_name]["weight"] == pytest.approx(errors["nf2"].weight, rel=1e-5)


def test_a_format_that_cannot_hold_a_layer_is_named(tmp_path):
    """Catches: a traceback for an odd width."""
    folder = write_tiny_model(tmp_path, intermediate_size=97)
    model, _ = load_base(str(folder), quantization="none", dtype="float32")
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.down_proj: NF4 packs two weights a byte"):
        layer_errors(model, EXAMPLES, [Quantization("nf4")])
    assert len(layer_errors(model, EXAMPLES, [Quantization("nf3")])) == 14


def test_runs_that_cannot_be_compared_are_refused(tiny_model_folder, tmp_path, capsys):
    """Catches: layers of two bases paired by their names, a run that is compared with itself."""
    other = write_tiny_model(tmp_path / "other", seed=1)
    write_run(tmp_path / "a", tiny_model_folder)
    write_run(tmp_path / "b", other)
    runs = ["--run", str(tmp_path / "a"), "--run", str(tmp_path / "b")]
    assert run_command("analyze", ["quantization", *runs]) == 2
    assert "the runs have different base models" in capsys.readouterr().err
    assert run_command("analyze", ["prune", *runs[:2], "--run", str(tmp_path / "b" / ".." / "a")]) == 2
    assert "is given twice" in capsys.readouterr().err
    assert run_command("analyze", ["prune", *runs, "--adapter", "x"]) == 2
    assert "--model and --adapter go with one --run" in capsys.readouterr().err
