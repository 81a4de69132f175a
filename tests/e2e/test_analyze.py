"""`analyze` on runs of the real commands."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import yaml

from qdora.cli import run_command
from qdora.cli.analyze import SUBCOMMANDS
from qdora.config_file import set_key
from tests.axes import axes_keys

from .runs import tiny_tree, write_config

pytestmark = pytest.mark.e2e


def trained(folder: Path, model: Path, method: str, **keys) -> Path:
    """A short run with checkpoints after steps 2, 4 and 6, of 7."""
    folder.mkdir()
    tree = tiny_tree(folder, model, max_steps=7, save_every=2, keep_checkpoints=9)
    if method == "full":
        del tree["adapter"]
        tree["training"] |= {"mode": "full", "learning_rate": 1e-3}
        tree["model"]["quantization"] = "none"
    else:
        tree["adapter"] = {**axes_keys(method), "r": 4, "alpha": 8}
        tree["training"]["learning_rate"] = 1e-2
    for key, value in keys.items():
        set_key(tree, key.replace("__", "."), value)
    assert run_command("train", ["--config", write_config(folder, tree)]) == 0
    return (folder / "run").rename(folder / method)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_model_folder) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("analyze")
    names = ("full", "qlora", "qdora")
    return {name: trained(folder / f"of-{name}", tiny_model_folder, name) for name in names}


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_decomposition_of_several_runs(runs, tmp_path, capsys):
    """Catches: a checkpoint, a layer or a run left out, runs on other bases compared with the first one's, a
    table or figure that is not written."""
    words = [word for run in runs.values() for word in ("--run", str(run))]
    assert run_command("analyze", ["decomposition", *words, "--output", str(tmp_path), "--threads", "1"]) == 0
    said = capsys.readouterr().out
    assert "slope ΔM/ΔD" in said
    found = rows(tmp_path / "changes.csv")
    assert len(found) == 3 * 4 * 14
    assert {(row["run"], row["method"]) for row in found} == {
        ("full", "full"),
        ("qlora", "nf4 + lora"),
        ("qdora", "nf4 + lora + dora"),
    }
    assert {(row["step"], row["final"]) for row in found} == {
        ("2", "False"),
        ("4", "False"),
        ("6", "False"),
        ("7", "True"),
    }
    assert all(float(row["delta_m"]) > 0 and float(row["delta_d"]) > 1e-12 for row in found)
    lines = rows(tmp_path / "fits.csv")
    assert {row["module"] for row in lines} == {"all", *(row["module"] for row in found)}
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert len(figures["changes"]) == len(found)
    assert len(figures["fits"]) == len(lines)
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert {"figure-2-q_proj.png", "figure-7-v_proj.png", "figure-3-q_proj.png", "layers.png"} <= drawn
    assert {"figure-8-q_proj-k_proj-v_proj.png", "scatter-down_proj.png"} <= drawn


def test_spectra_of_a_run_and_of_a_model(runs, tiny_model_folder, tmp_path, capsys):
    """Catches: a default folder other than the run's, a model that cannot be looked at without a run."""
    assert run_command("analyze", ["spectra", "--run", str(runs["qdora"])]) == 0
    assert "effective rank" in capsys.readouterr().out
    folder = runs["qdora"] / "analysis" / "spectra"
    found = rows(folder / "spectra.csv")
    assert {row["kind"] for row in found} == {"base", "change", "update"}
    assert {row["values"] for row in found if row["kind"] == "update"} == {"4"}
    assert (folder / "spectra.png").is_file()
    words = ["spectra", "--model", str(tiny_model_folder)]
    assert run_command("analyze", words) == 2
    assert "name a folder to write with --output" in capsys.readouterr().err
    assert run_command("analyze", [*words, "--output", str(tmp_path)]) == 0
    assert {row["kind"] for row in rows(tmp_path / "spectra.csv")} == {"base"}


@pytest.mark.parametrize("by", ["spectra", "hessian"])
def test_ranks_are_a_configuration_that_trains(runs, tiny_model_folder, tmp_path, capsys, by):
    """Catches: advice that no run takes, over its budget, or of a run that it does not follow from."""
    config = runs["qdora"] / "config.yaml"
    words = ["ranks", "--config", str(config), "--by", by, "--max-rank", "12", "--budget", "7000"]
    words += ["--examples", "8"] if by == "hessian" else []
    assert run_command("analyze", [*words, "--output", str(tmp_path)]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert f"{figures['parameters']:,} parameters of a budget of 7,000" in capsys.readouterr().out
    overlay = yaml.safe_load((tmp_path / "ranks.yaml").read_text())
    ranks = overlay["adapter.rank_pattern"]
    assert len(ranks) == 14
    assert len(set(ranks.values())) > 1
    assert max(ranks.values()) <= 12
    dry = tmp_path / "trained"
    keys = (tmp_path / "ranks.args").read_text().split()
    keys += ["--set", f"output.dir={dry}", "--set", "training.max_steps=1"]
    assert run_command("train", ["--config", str(config), *keys]) == 0
    trained_parameters = json.loads((dry / "manifest.json").read_text())["trainable_parameters"]
    magnitudes = 2 * (64 + 32 + 32 + 64 + 96 + 96 + 64)
    assert trained_parameters == figures["parameters"] + magnitudes
    assert (
        figures["parameters"]
        <= 7000
        < figures["parameters"] + max(layer["parameters"] // layer["rank"] for layer in figures["layers"])
    )


def test_ranks_of_what_a_run_has_learned(runs, tmp_path, capsys):
    """Catches: ranks of the base weights for those of the update; more ranks than an update has."""
    for name, kind in (("qdora", "update"), ("qlora", "change"), ("full", "change")):
        words = ["ranks", "--run", str(runs[name]), "--output", str(tmp_path / name), "--budget", "5000"]
        assert run_command("analyze", words) == 0
        figures = json.loads((tmp_path / name / "figures.json").read_text())
        assert figures["gains_of"] == f"squared singular values: {kind}"
        assert max(layer["rank"] for layer in figures["layers"]) <= (64 if name == "full" else 4)
    assert "of a budget of 5,000" in capsys.readouterr().out


def test_what_cannot_be_analyzed(runs, tmp_path, tiny_model_folder, capsys):
    """Catches: a traceback, or minutes of work before a typo is named."""
    run, output = str(runs["qlora"]), ("--output", str(tmp_path / "out"))
    config, model = f"{run}/config.yaml", ("ranks", "--model", str(tiny_model_folder))
    vera, unknown = ("--set", "adapter.type=vera"), ("--set", "adapter.targets=[q_prj]")
    refused = {
        "is given twice": ("decomposition", "--run", run, "--run", run),
        "nowhere: not a run directory": ("decomposition", "--run", str(tmp_path / "nowhere")),
        "has one rank for all layers": ("ranks", "--run", run, *vera),
        "takes even ranks only": ("ranks", "--run", run, "--set", "adapter.init=orthogonal"),
        "--budget 0; allowed: 1 or more": ("ranks", "--run", run, "--budget", "0"),
        "takes 1856 parameters": ("ranks", "--run", run, "--budget", "100"),
        "--probes goes with --by hessian": ("ranks", "--run", run, "--probes", "3"),
        "name one of them": ("spectra", "--run", run, "--config", config),
        "takes a sample of training data": (*model, "--by", "hessian", *output),
        "matches no linear layer": ("ranks", "--config", config, *output, *unknown),
    }
    for message, words in refused.items():
        assert run_command("analyze", words) == 2, words
        said = capsys.readouterr().err
        assert message in said
    assert not (tmp_path / "out").exists()


def test_the_list_of_subcommands(capsys):
    """Catches: a subcommand that the help does not show, or whose own help fails."""
    for words in (["--help"], *([name, "--help"] for name in SUBCOMMANDS)):
        with pytest.raises(SystemExit) as stop:
            run_command("analyze", words)
        assert stop.value.code == 0
    said = capsys.readouterr().out
    assert all(name in said for name in SUBCOMMANDS)
    with pytest.raises(SystemExit) as stop:
        run_command("analyze", ["spectrum"])
    assert stop.value.code == 2
    assert "decomposition" in capsys.readouterr().err
