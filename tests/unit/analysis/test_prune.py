"""Pruning by magnitude, and the scores of pruned runs."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qdora.adapters.inject import adapted_layers, inject
from qdora.adapters.layer import AdaptedLinear, OutputLinear
from qdora.analysis.prune import (
    PrunedScore,
    merge_into_linears,
    prune_smallest_,
    results,
    score_pruned,
    table,
)
from qdora.cli import run_command
from qdora.distributed.context import DistributedContext
from qdora.evaluation.evaluate import evaluate_adapter
from qdora.evaluation.scores import Prediction, Scores, summarize
from qdora.models.load import load_base
from qdora.run import RunDirectory
from qdora.tasks import task_for
from qdora.tasks.scoring import Verdict
from tests.axes import adapter_config
from tests.tiny import write_tiny_model
from tests.unit.adapters.oracle import move_off_the_identity, relative

from .runs import write_run


def smallest(w_OI: torch.Tensor, sparsity: float) -> np.ndarray:
    """The pruned matrix, by sorting."""
    values = w_OI.numpy().copy().reshape(-1)
    order = np.argsort(np.abs(values), kind="stable")
    values[order[: round(sparsity * values.size)]] = 0
    return values.reshape(w_OI.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (64, 96)])
def test_the_smallest_entries_are_pruned_exactly(shape, dtype):
    """Catches: more or fewer entries than asked for where many are equal, rows that are pruned apart, signs
    that count, the largest entries pruned, another outcome in steps than at once."""
    w_OI = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(3).round().add(0.0).div(3)
    w_OI[: shape[0] // 2] *= 4
    w_OI = w_OI.to(dtype)
    stepwise = w_OI.clone()
    for sparsity in (0.0, 0.1, 0.333, 0.5, 0.97):
        expected = smallest(w_OI.float(), sparsity)
        at_once = w_OI.clone()
        assert prune_smallest_(at_once, sparsity) == round(sparsity * w_OI.numel())
        assert np.array_equal(at_once.float().numpy(), expected)
        prune_smallest_(stepwise, sparsity)
        assert torch.equal(stepwise, at_once)


def test_a_merged_model_is_plain_and_computes_the_same(tiny_model_folder: Path) -> None:
    """Catches: layers without an adapter that stay quantized, a magnitude that is lost, an output layer that
    is pruned."""
    model, _ = load_base(str(tiny_model_folder), dtype="float32")
    inject(model, adapter_config(r=4, alpha=11.0, targets=("q_proj", "down_proj")))
    for seed, layer in enumerate(adapted_layers(model).values()):
        move_off_the_identity(layer, seed)
    ids = torch.arange(4, 28).view(2, 12)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        matrices = merge_into_linears(model)
        assert relative(model(input_ids=ids).logits, expected) < 1e-5
    assert not any(isinstance(module, AdaptedLinear) for module in model.modules())
    assert isinstance(model.lm_head, OutputLinear)
    assert sum(w_OI.numel() for w_OI in matrices) == 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96)
    before = model.lm_head.weight.clone()
    for w_OI in matrices:
        prune_smallest_(w_OI, 0.5)
    assert float((model.model.layers[1].mlp.up_proj.weight == 0).float().mean()) == 0.5
    assert torch.equal(model.lm_head.weight, before)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("prune")
    # Large initial weights: answers that differ from question to question, and with what is pruned.
    model = write_tiny_model(folder / "model", initializer_range=0.3, tie_word_embeddings=False)
    write_run(folder / "dora", model)
    write_run(folder / "lora", model, dora=False, seed=1)
    return folder


def test_without_pruning_a_run_has_its_own_answers(run_folder: Path) -> None:
    """Catches: a merge in another dtype or without the adapter; weights pruned before the score at 0; scores
    of sparsities in another order, or of a model that stays dense."""
    directory = RunDirectory(run_folder / "dora")
    config, adapter = directory.config(), directory.finished_adapter()
    context = DistributedContext()
    (own,) = evaluate_adapter(config, adapter, context)
    base = evaluate_adapter(config, None, context)[0]
    found = list(score_pruned("dora", config, adapter, [0.5, 0.0], context))
    assert [entry.sparsity for entry in found] == [0.0, 0.5]
    outputs = [[p.output for p in entry.scores[0].predictions] for entry in found]
    assert outputs[0] == [p.output for p in own.predictions]
    assert outputs[0] != [p.output for p in base.predictions]
    assert outputs[1] != outputs[0]
    assert len(set(outputs[0])) > 3
    assert [entry.pruned for entry in found] == [0, found[0].weights // 2]


def test_the_command_writes_what_it_prints(run_folder, tmp_path, capsys):
    """Catches: --limit that is ignored, runs mixed up, a file that says something else."""
    words = ["prune", "--run", str(run_folder / "lora"), "--run", str(run_folder / "dora"), "--limit", "5"]
    words += ["--sparsity", "0.5,0", "--output", str(tmp_path / "out")]
    assert run_command("analyze", words) == 0
    tree = json.loads((tmp_path / "out" / "figures.json").read_text())
    rows = tree["scores"]
    assert [(row["run"], row["sparsity"]) for row in rows] == [
        ("lora", 0.0),
        ("lora", 0.5),
        ("dora", 0.0),
        ("dora", 0.5),
    ]
    assert all(row["total"] == 5 for row in rows)
    assert [row["difference"] is None for row in rows] == [True, True, False, False]
    assert len(list(csv.DictReader((tmp_path / "out" / "scores.csv").open()))) == 4
    assert (tmp_path / "out" / "scores.png").read_bytes().startswith(b"\x89PNG")
    assert "minus lora, points" in capsys.readouterr().out


def scores(answers: str) -> Scores:
    def prediction(number: int, right: bool) -> Prediction:
        verdict = Verdict("1", "1" if right else "2", right)
        both = {"normalized": verdict, "published": verdict}
        return Prediction(f"q{number}", "p", "o", "1", verdict.gold, right, 3, True, both)

    return summarize(task_for("gsm8k"), [prediction(n, a == "T") for n, a in enumerate(answers)], {}, 2.0)


def test_differences_are_paired_with_the_first_run_at_the_same_sparsity():
    """Catches: a difference of the wrong sign or to another sparsity; one over questions that differ."""
    found = [
        PrunedScore("a", 0.0, 0, 100, [scores("TTFF")]),
        PrunedScore("a", 0.5, 50, 100, [scores("FFFF")]),
        PrunedScore("b", 0.0, 0, 100, [scores("TTTF")]),
        PrunedScore("b", 0.5, 50, 100, [scores("TTTT")]),
        PrunedScore("c", 0.5, 50, 100, [scores("TTT")]),
    ]
    rows = results(found)
    assert [row["difference"] for row in rows] == [None, None, 0.25, 1.0, None]
    assert rows[3]["p_value"] == pytest.approx(0.125)
    assert rows[3]["exact_match"] == found[3].exact_match == 1.0
    assert "+100.0 ± 0.0" in table(rows)
