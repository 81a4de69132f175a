"""Few-shot prompts in an evaluation, and answers that end where the next question begins."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import qdora.evaluation.evaluate as evaluation
from qdora.data.rows import Example
from qdora.errors import InputError
from qdora.evaluation import continuous
from qdora.evaluation.evaluate import evaluate
from qdora.evaluation.generation import Generation, generate, read_answer

SHOTS = [Example("1 + 1?", "It is 2.", "2", "synthetic", "train:3")]
QUESTIONS = [Example(f"{i} + 2?", f"It is {i + 2}.", f"{i + 2}", "synthetic", f"t:{i}") for i in range(3)]
SETTINGS: dict[str, Any] = {
    "prompt": "question_answer",
    "max_new_tokens": 40,
    "batch_size": 2,
    "show_progress": False,
}


def test_shots_are_in_the_prompt_and_in_the_report(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Catches: shots that do not reach the model, or of which the report says nothing; those of another
    task; a report that changes where there are none."""
    given = {"synthetic": SHOTS, "boolq": [Example("Q", "true", "true", "boolq", "b:1")]}
    (scores,) = evaluate(model, tokenizer, QUESTIONS, shots=given, **SETTINGS)
    for prediction, question in zip(scores.predictions, QUESTIONS, strict=True):
        before = "###Question:\n1 + 1?\n###Answer:\nIt is 2.\n\n"
        assert prediction.prompt == f"{before}###Question:\n{question.question}\n###Answer:\n"
    assert scores.decoding["shots"] == ["train:3"]
    (without,) = evaluate(model, tokenizer, QUESTIONS, **SETTINGS)
    assert "shots" not in without.decoding
    assert [p.output for p in without.predictions] != [p.output for p in scores.predictions]


def test_ranking_has_them_too(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Catches: options ranked behind the bare question."""
    examples = [Example("Is it?", "yes", "yes", "ARC-Easy", "a:1", ("yes", "no"))]
    shots = {"ARC-Easy": [Example("Was it?", "no", "no", "ARC-Easy", "a:7", ("yes", "no"))]}
    settings = SETTINGS | {"prompt": "cloze"}
    (shot,) = evaluate(model, tokenizer, examples, method="rank", shots=shots, **settings)
    assert shot.predictions[0].prompt == "Question: Was it?\nAnswer: no\n\nQuestion: Is it?\nAnswer:"
    joined = Example(
        "Was it?\nAnswer: no\n\nQuestion: Is it?", "yes", "yes", "ARC-Easy", "a:1", ("yes", "no")
    )
    (same,) = evaluate(model, tokenizer, [joined], method="rank", **settings)
    assert same.predictions[0].options == shot.predictions[0].options


def test_a_prompt_too_long_with_its_shots_is_named(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Catches: shots that push the question out of the context."""
    with pytest.raises(InputError, match=r"t:0: the prompt has .*context is 256"):
        evaluate(model, tokenizer, QUESTIONS, shots={"synthetic": SHOTS * 6}, **SETTINGS)


def writes(tokenizer: PreTrainedTokenizerFast, text: str) -> Any:
    """A patch under which continuous batching generates a text, whatever the prompt."""
    ids = tokenizer(text)["input_ids"]

    def call(self: Any, given: Any, starts_N: Any) -> Any:
        real(self, given, starts_N)
        done = [0] * (len(starts_N) - len(self.batch)) or [len(s.ids) for s in self.batch]
        import torch

        return torch.tensor([ids[n] for n in done])

    real = continuous.Batch._call
    return mock.patch.object(continuous.Batch, "_call", call)


@pytest.mark.parametrize("stop", [None, "\n###Question:"])
def test_generation_ends_where_the_next_question_begins(
    stop: str | None, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Catches: a base model that goes on with questions of its own until the limit, its answer read from
    them; text cut off that belongs to the answer; an answer cut without shots, as none was before."""
    said = "So 3.\n##\n\n###Question:\nNext 9?\n###Answer:\n9"
    prompts = [tokenizer("a b")["input_ids"]]
    settings: dict[str, Any] = {"pad_id": 0, "max_new_tokens": 40, "batch_size": 1}
    with writes(tokenizer, said):
        (answer,) = generate(model, tokenizer, prompts, stop=stop, **settings)
    if stop is None:
        assert answer == Generation(said[:40], 40, False)
    else:
        assert answer == Generation("So 3.\n##\n", said.index("Next") - 1, True)


def test_fixed_batches_cut_the_same_text(tokenizer: PreTrainedTokenizerFast) -> None:
    """Catches: the invented question scored where an architecture allows no continuous batching."""
    ids = tokenizer("It is 4.\n###Question:\n5?")["input_ids"]
    eos = [tokenizer.eos_token_id]
    assert read_answer(ids, eos, tokenizer, "\n###Question:").text == "It is 4."
    assert read_answer(ids, eos, tokenizer).text.endswith("5?")
    assert not read_answer(ids[:8], eos, tokenizer, "\n###Question:").stopped


def test_an_answer_is_asked_to_end_with_shots_only(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Catches: figures of runs without shots that change."""
    for shots, wanted in (({"synthetic": SHOTS}, "\n###Question:"), (None, None)):
        with mock.patch.object(evaluation, "generate", wraps=generate) as called:
            evaluate(model, tokenizer, QUESTIONS, shots=shots, **SETTINGS)
        assert called.call_args.kwargs["stop"] == wanted
