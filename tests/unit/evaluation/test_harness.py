"""lm-evaluation-harness on our models: its figures are ours, its reports come back as they were written."""

from __future__ import annotations

import copy
import importlib.metadata
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from qdora.adapters.inject import adapted_layers, inject
from qdora.adapters.peft_io import save_adapter
from qdora.cli import run_command
from qdora.config import DatasetConfig, RunConfig
from qdora.config_file import check_config
from qdora.data.rows import Example
from qdora.data.templates import PROMPTS
from qdora.distributed.context import DistributedContext
from qdora.errors import InputError
from qdora.evaluation import harness
from qdora.evaluation.evaluate import evaluate
from qdora.evaluation.harness import (
    HarnessMetric,
    evaluate_harness,
    load_tasks,
    read_harness_scores,
    score_loaded,
)
from qdora.evaluation.scores import wilson_interval
from qdora.export.merged import merge_and_export
from qdora.models.load import load_base
from qdora.tasks import load_dataset
from tests.axes import adapter_config
from tests.harness_tasks import CHOICES, write_choices, write_task
from tests.tiny import write_tiny_model
from tests.unit.adapters.oracle import move_off_the_identity

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install lm-eval")

ALONE = DistributedContext()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness' documents are kept with the test, and `pip list` is not run for each of its results."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base whose logits lie apart, an adapter of QDoRA on it, and both merged."""
    root = tmp_path_factory.mktemp("saved")
    base = write_tiny_model(root / "base", initializer_range=0.3, dtype=torch.float32)
    model, tokenizer = load_base(base, dtype="float32")
    inject(model, adapter_config(method="qdora", r=4, alpha=12))
    for seed, layer in enumerate(adapted_layers(model).values()):
        move_off_the_identity(layer, seed)
    save_adapter(model, root / "adapter")
    merge_and_export(model, tokenizer, root / "merged")
    return {name: root / name for name in ("base", "adapter", "merged")}


def run_config(model: Path, **evaluation: Any) -> Any:
    nothing = {"source": "synthetic", "count": 1}
    tree = {
        "model": {"path": str(model), "dtype": "float32", "quantization": "none"},
        "data": {"train": nothing},
        "training": {"max_steps": 1},
        "evaluation": {"batch_size": 3, **evaluation},
        "output": {"dir": "unused"},
    }
    return check_config(tree, RunConfig, "test")


def harness_scores(saved: Path, names: Sequence[str], tasks: Path, folder: Path, **evaluation: Any) -> Any:
    """What the harness says of an exported model, loaded by plain transformers."""
    _, tokenizer = load_base(saved, quantization="none")
    model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    config = run_config(saved, weights="adapted", **evaluation)
    return score_loaded(model, tokenizer, load_tasks(names, tasks), config, ALONE, folder)


def logged(folder: Path, task: str) -> list[dict[str, Any]]:
    lines = (folder / f"{task}.samples.jsonl").read_text().splitlines()
    return sorted((json.loads(line) for line in lines), key=lambda sample: sample["doc_id"])


@pytest.mark.parametrize("source", ["own", "ARC-Easy"])
def test_an_exports_choices_are_those_of_our_ranking(
    source: str, saved: dict[str, Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Catches: another prompt, another division into tokens, another sum or another length than the harness
    has; a score of the export that is not that of the harness."""
    examples: Sequence[Example] = CHOICES
    if source == "ARC-Easy":
        root = request.getfixturevalue("shared_data") / "commonsense"
        config = DatasetConfig(source=source, path=str(root), split="test", answers="text", limit=5)
        examples = load_dataset(config, "stop").examples
    tasks = write_choices(tmp_path / "tasks", examples)
    (theirs,) = harness_scores(saved["merged"], ["choices"], tasks, tmp_path / "out")
    model, tokenizer = load_base(saved["merged"], quantization="none", dtype="float32")
    (ours,) = evaluate(
        model,
        tokenizer,
        [Example(e.question, e.completion, e.answer, "ARC-Easy", e.origin, e.options) for e in examples],
        method="rank",
        prompt="cloze",
        max_new_tokens=4,
        batch_size=5,
        show_progress=False,
    )
    samples = logged(tmp_path / "out", "choices")
    for prediction, sample in zip(ours.predictions, samples, strict=True):
        sums = [response[0][0] for response in sample["resps"]]
        assert [option.log_probability for option in prediction.options] == pytest.approx(sums, abs=1e-3)
        assert prediction.correct == bool(sample["acc"])
        assert prediction.scorers["likelihood_per_character"].correct == bool(sample["acc_norm"])
    values = {metric.metric: metric for metric in theirs.metrics}
    pairs = {"acc": "likelihood", "acc_norm": "likelihood_per_character"}
    for name, scorer in pairs.items():
        assert values[name].value == pytest.approx(ours.per_scorer[scorer].score)
        assert values[name].interval == pytest.approx(ours.per_scorer[scorer].interval)
    assert theirs.total == ours.total == len(examples)
    # Of these a character model has some and not all.
    assert source != "own" or 0 < ours.correct < ours.total


def test_an_exports_answers_are_those_of_our_generation(saved: dict[str, Path], tmp_path: Path) -> None:
    """Catches: other greedy tokens, another end of an answer, another exact match than the harness has."""
    template = PROMPTS["question_answer"].text
    assert template is not None
    asked = [f"{a} plus {b}?" for a, b in ((1, 2), (30, 4), (5, 66), (7, 8), (9, 1), (2, 2))]
    model, tokenizer = load_base(saved["merged"], quantization="none", dtype="float32")

    def answers(golds: Sequence[str]) -> Any:
        examples = [Example(q, g, g, "mine", f"m:{q}") for q, g in zip(asked, golds, strict=True)]
        decoding = {"prompt": "question_answer", "max_new_tokens": 8, "batch_size": 4, "show_progress": False}
        (scores,) = evaluate(model, tokenizer, examples, kind="text", **decoding)
        return scores

    written = [prediction.extracted or "none" for prediction in answers(["x"] * len(asked)).predictions]
    golds = [text if i % 2 else f"{text}!" for i, text in enumerate(written)]
    tasks = write_task(
        tmp_path / "tasks",
        "sums",
        [{"prompt": template.replace("{question}", q), "gold": g} for q, g in zip(asked, golds, strict=True)],
        output_type="generate_until",
        doc_to_text="prompt",
        doc_to_target="gold",
        generation_kwargs={"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        filter_list=[{"name": "line", "filter": [{"function": "take_first"}]}],
    )
    (theirs,) = harness_scores(saved["merged"], ["sums"], tasks, tmp_path / "out")
    ours = answers(golds)
    for prediction, sample in zip(ours.predictions, logged(tmp_path / "out", "sums"), strict=True):
        assert sample["arguments"][0][0] == prediction.prompt
        assert sample["filtered_resps"][0].strip() == (prediction.extracted or "")
        assert prediction.correct == bool(sample["exact_match"])
    (metric,) = theirs.metrics
    assert (metric.metric, metric.filter) == ("exact_match", "line")
    assert metric.value == ours.score == 0.5


@pytest.mark.parametrize("weights", ["adapted", "merged"])
def test_a_run_is_scored_as_it_is_in_memory(weights: str, saved: dict[str, Path], tmp_path: Path) -> None:
    """Catches: the base scored in place of the adapted model, an adapter that the harness' tying of weights
    undoes, reports that lose figures, an interval that is another's."""
    tasks = write_choices(tmp_path / "tasks", CHOICES)
    config = run_config(saved["base"], weights=weights).model_copy(
        update={"model": run_config(saved["base"]).model.model_copy(update={"quantization": "nf4"})}
    )
    (scores,) = evaluate_harness(
        config, saved["adapter"], ALONE, ["choices"], tasks_folder=tasks, folder=tmp_path / "evaluation"
    )
    (merged,) = harness_scores(saved["merged"], ["choices"], tasks, tmp_path / "merged")
    (base,) = evaluate_harness(config, None, ALONE, ["choices"], tasks_folder=tasks, folder=tmp_path / "base")

    def sums(folder: Path) -> torch.Tensor:
        return torch.tensor([r[0][0] for s in logged(folder, "choices") for r in s["resps"]])

    adapted = sums(tmp_path / "evaluation/lm-eval")
    torch.testing.assert_close(adapted, sums(tmp_path / "merged"), atol=0.1, rtol=5e-3)
    assert (adapted - sums(tmp_path / "base/lm-eval")).abs().mean() > 1
    assert [m.value for m in scores.metrics] == [m.value for m in merged.metrics]
    assert base.decoding["weights"] in ("merged", weights)
    assert scores.decoding == {
        "method": f"lm_eval {importlib.metadata.version('lm_eval')}",
        "batch_size": 3,
        "processes": 1,
        "weights": weights,
    }
    assert (scores.total, scores.available, scores.shots, scores.task_version) == (7, 7, 0, 2.0)
    assert (scores.dataset, scores.split) == ("json", "test")
    correct = round(7 * scores.metrics[0].value)
    stderr = scores.harness["results"]["acc_stderr,none"]
    assert scores.metrics[0] == HarnessMetric(
        "acc", "none", pytest.approx(correct / 7), stderr, wilson_interval(correct, 7), True
    )
    assert read_harness_scores(tmp_path / "evaluation/lm-eval/choices.json") == scores


def test_groups_and_limits(saved: dict[str, Path], tmp_path: Path) -> None:
    """Catches: a group whose mean is lost or counted once more, a limit that the harness is not told."""
    tasks = write_choices(tmp_path / "tasks", CHOICES, "first")
    write_choices(tasks, CHOICES[2:], "second")
    group = {"group": "both", "task": ["first", "second"]}
    group["aggregate_metric_list"] = [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}]
    (tasks / "both.yaml").write_text(yaml.safe_dump(group))
    found = harness_scores(saved["merged"], ["both", "first"], tasks, tmp_path / "out", limit=4)
    by_name = {scores.task: scores for scores in found}
    assert set(by_name) == {"both", "first", "second"}
    assert {name: (s.total, s.available) for name, s in by_name.items()} == {
        "both": (8, 12),
        "first": (4, 7),
        "second": (4, 5),
    }
    values = {name: s.metrics[0].value for name, s in by_name.items()}
    assert values["both"] == pytest.approx((values["first"] + values["second"]) / 2)
    low, high = by_name["both"].metrics[0].interval or (0, 0)
    stderr = by_name["both"].metrics[0].stderr
    assert stderr is not None
    assert (high - low) / 2 == pytest.approx(1.96 * stderr, rel=1e-4)


def test_logits_that_are_no_numbers_have_no_score(saved: dict[str, Path], tmp_path: Path) -> None:
    """Catches: chance reported for a model that computes NaN."""
    tasks = load_tasks(["choices"], write_choices(tmp_path / "tasks", CHOICES))
    model, tokenizer = load_base(saved["base"], quantization="none", dtype="float32")
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    with pytest.raises(InputError, match=r"NaN or infinite.*model\.norm\.weight"):
        score_loaded(model, tokenizer, tasks, run_config(saved["base"]), ALONE, None)


def test_unknown_tasks_and_data_that_cannot_be_loaded(tmp_path: Path) -> None:
    """Catches: KeyError or a hub library's traceback, minutes after the weights were loaded."""
    from lm_eval.tasks import TaskManager

    tasks = write_choices(tmp_path / "tasks", CHOICES)
    (tasks / "gone.yaml").write_text(
        (tasks / "choices.yaml").read_text().replace("choices.jsonl", "no.jsonl")
    )
    with pytest.raises(InputError, match=r"--lm-eval .*gone.yaml: the task cannot be loaded: \w+: "):
        load_tasks([str(tasks / "gone.yaml")], tasks)
    (tasks / "unsafe.yaml").write_text((tasks / "choices.yaml").read_text() + "unsafe_code: true\n")
    with pytest.raises(InputError, match=r"choices: runs code that the model writes"):
        load_tasks([str(tasks / "unsafe.yaml")], tasks)
    own = TaskManager(include_path=tasks, include_defaults=False)
    with pytest.raises(InputError, match=r"no task 'choice'; did you mean 'choices'\? `lm-eval ls"):
        harness._matched(own, "choice")
    with pytest.raises(InputError, match=r"--lm-eval-tasks nowhere: no such folder"):
        load_tasks(["choices"], Path("nowhere"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lm-eval", "a", "--data", "x.jsonl"], "--data does not go with it"),
        (["--lm-eval", "a", "--task", "x"], "--task does not go with it"),
        (["--lm-eval", "a", "--split", "validation"], "--split validation does not go with it"),
        (["--lm-eval", " , "], "names no task"),
        (["--lm-eval-tasks", "folder"], "name those to score with --lm-eval"),
    ],
)
def test_options_that_contradict_each_other(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches: an option that is silently without effect."""
    assert run_command("evaluate", ["--model", "nowhere", *words]) == 2
    assert message in capsys.readouterr().err


def test_without_the_harness(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches: ModuleNotFoundError in place of how to install it."""
    monkeypatch.setattr("qdora.errors.find_spec", lambda name: None)
    assert run_command("evaluate", ["--model", "nowhere", "--lm-eval", "arc_easy"]) == 2
    assert 'not installed: pip install "qdora[eval]"' in capsys.readouterr().err


def test_ranks_divide_the_documents(saved: dict[str, Path], tmp_path: Path) -> None:
    """Catches: every rank scoring all documents, a rank's documents lost, ranks with different scores."""
    folder = write_choices(tmp_path / "tasks", CHOICES)
    (alone,) = harness_scores(saved["merged"], ["choices"], folder, tmp_path / "alone")
    barrier = threading.Barrier(2, timeout=300)
    slots: list[list[Any]] = [[], []]
    results: list[Any] = [None, None]
    _, tokenizer = load_base(saved["merged"], quantization="none")
    model = AutoModelForCausalLM.from_pretrained(saved["merged"], dtype=torch.float32)
    config = run_config(saved["merged"], weights="adapted")

    def process(rank: int) -> None:
        def gather(own: list[Any]) -> list[Any]:
            slots[rank] = own
            barrier.wait()
            joined = [item for slot in slots for item in slot]
            barrier.wait()
            return joined

        context = DistributedContext(rank, 2)
        context.gather = gather  # type: ignore[method-assign]
        context.barrier = barrier.wait  # type: ignore[assignment, method-assign]
        with context.raise_on_all_ranks():
            own = copy.deepcopy(model), copy.deepcopy(tokenizer), load_tasks(["choices"], folder)
        results[rank] = score_loaded(*own, config, context, tmp_path / "two")

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (scores,) in results:
        assert [m.value for m in scores.metrics] == [m.value for m in alone.metrics]
        assert [m.interval for m in scores.metrics] == [m.interval for m in alone.metrics]
        assert (scores.total, scores.decoding["processes"]) == (7, 2)
    assert len(logged(tmp_path / "two", "choices")) == 7
