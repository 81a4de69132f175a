"""Evaluation end to end on a tiny model, in one process and in several."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import qdora.evaluation.evaluate as evaluation
from qdora.config import RunConfig
from qdora.config_file import check_config
from qdora.data.rows import Example
from qdora.data.tokenize import tokenize_examples
from qdora.distributed.context import DistributedContext
from qdora.errors import InputError
from qdora.evaluation.evaluate import evaluate
from qdora.evaluation.generation import Generation
from qdora.evaluation.scores import Scores

EXAMPLES = [
    Example(
        f"What is {a} + {b}?",
        f"{a} + {b} = {a + b}\nThe answer is {a + b}.",
        str(a + b),
        "synthetic",
        f"s:{i}",
    )
    for i, (a, b) in enumerate([(1, 2), (30, 4), (5, 600), (7, 8), (9, 1000), (11, 12), (1300, 1400)])
]
SETTINGS: dict[str, Any] = {
    "prompt": "question_answer",
    "max_new_tokens": 6,
    "batch_size": 2,
    "show_progress": False,
}


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], None]:
    """Replace generation by given outputs, by question."""

    def install(outputs: dict[str, str]) -> None:
        def answer(
            model: object, tokenizer: Any, prompts: Sequence[Sequence[int]], progress: Any, **_: object
        ) -> list[Generation]:
            texts = [tokenizer.decode(ids) for ids in prompts]
            chosen = [next(o for q, o in outputs.items() if q in text) for text in texts]
            generations = [Generation(text, len(text), text != "cut") for text in chosen]
            progress(dict(enumerate(generations)))
            return generations

        monkeypatch.setattr(evaluation, "generate", answer)

    return install


def in_processes(
    count: int, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example]
) -> list[list[Scores]]:
    """`evaluate` in threads that stand for ranks, with a gather that waits for all."""
    barrier = threading.Barrier(count, timeout=300)
    slots: list[list[Any]] = [[] for _ in range(count)]
    results: list[list[Scores]] = [[] for _ in range(count)]

    def process(rank: int) -> None:
        def gather(own: list[Any]) -> list[Any]:
            slots[rank] = own
            barrier.wait()
            joined = [item for slot in slots for item in slot]
            barrier.wait()
            return joined

        own_model, own_tokenizer = copy.deepcopy(model), copy.deepcopy(tokenizer)
        context = DistributedContext(rank, count)
        context.gather = gather  # type: ignore[method-assign]
        results[rank] = evaluate(own_model, own_tokenizer, examples, context=context, **SETTINGS)

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_scores_add_up(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, says: Callable[[dict[str, str]], None]
) -> None:
    """Catches: a score without its scorers, counts that disagree with the predictions, lost provenance."""
    says(
        {
            "1 + 2?": "It is $3",
            "30 + 4?": "34.",
            "5 + 600?": "no idea",
            "7 + 8": "cut",
            "": "The answer is 0.",
        }
    )
    (scores,) = evaluate(model, tokenizer, EXAMPLES, **SETTINGS)
    assert (scores.task, scores.metric, scores.scorer) == ("synthetic", "exact_match", "normalized")
    assert (scores.correct, scores.total, scores.score) == (2, 7, 2 / 7)
    assert scores.stderr == pytest.approx((2 / 7 * 5 / 7 / 7) ** 0.5)
    assert scores.interval[0] < 2 / 7 < scores.interval[1]
    assert {name: result.correct for name, result in scores.per_scorer.items()} == {
        "normalized": 2,
        "published": 1,
        "math_verify": 2,
    }
    assert scores.per_scorer["normalized"].no_answer == 2
    assert scores.cut_off == 1
    assert scores.generated_tokens == sum(p.tokens for p in scores.predictions)
    assert [p.origin for p in scores.predictions] == [e.origin for e in EXAMPLES]
    first = scores.predictions[0]
    assert (first.extracted, first.gold, first.correct) == ("$3", "3", True)
    assert first.prompt == "###Question:\nWhat is 1 + 2?\n###Answer:\n"
    assert scores.decoding == {
        "method": "greedy",
        "batching": "continuous",
        "prompt": "question_answer",
        "max_new_tokens": 6,
        "batch_size": 2,
        "processes": 1,
        "eos_token_ids": [tokenizer.eos_token_id],
        "weights": "merged",
    }


def test_tasks_are_scored_apart(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, says: Callable[[dict[str, str]], None]
) -> None:
    """Catches: a mix reported as one number, or judged by one task's rule."""
    says({"Q1": "true", "Q2": "It is 5.0", "Q3": "false"})
    examples = [
        Example("Q1", "the correct answer is true", "true", "boolq", "b:1"),
        Example("Q2", "5", "5", "mine", "m:1"),
        Example("Q3", "the correct answer is true", "true", "boolq", "b:2"),
    ]
    boolq, mine = evaluate(model, tokenizer, examples, **SETTINGS)
    assert (boolq.task, boolq.correct, boolq.total, list(boolq.per_scorer)) == (
        "boolq",
        1,
        2,
        ["first_answer_word"],
    )
    assert (mine.task, mine.correct, mine.total) == ("mine", 1, 1)


def test_own_choice_task_takes_its_words_from_the_golds(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, says: Callable[[dict[str, str]], None]
) -> None:
    """Catches: no answer words, so that all is wrong; "choice1" found in "choice10"."""
    says({"Q1": "choice10", "Q2": "choice1"})
    examples = [
        Example(f"Q{i}", "", answer, "mine", f"m:{i}") for i, answer in [(1, "choice10"), (2, "choice1")]
    ]
    (scores,) = evaluate(model, tokenizer, examples, kind="choice", **SETTINGS)
    assert scores.correct == 2
    with pytest.raises(InputError, match="two different gold answers"):
        evaluate(model, tokenizer, examples[:1], kind="choice", **SETTINGS)


@pytest.mark.parametrize(("count", "examples"), [(2, EXAMPLES), (3, EXAMPLES), (3, EXAMPLES[:2])])
def test_processes_agree_with_one(
    count: int, examples: list[Example], model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Catches: examples lost or counted twice, and processes that return different scores."""
    (alone,) = evaluate(model, tokenizer, examples, **SETTINGS)
    together = [scores for (scores,) in in_processes(count, model, tokenizer, examples)]
    assert len(alone.predictions) == len(examples)
    assert all(scores.predictions == alone.predictions for scores in together)
    assert len({(s.score, s.total, s.seconds, s.generated_tokens) for s in together}) == 1


def test_shares_are_of_one_size() -> None:
    """Catches: a deadlock of a sharded model that one process calls less often than another."""
    for total in range(1, 9):
        shares = [evaluation._rank_indices(list(range(total)), rank, 4) for rank in range(4)]
        assert len({len(share) for share in shares}) == 1
        assert {index for share in shares for index in share} == set(range(total))


def test_shares_are_like_work() -> None:
    """Catches: one process with all the long prompts, while the others wait for it."""
    lengths = [10 * n for n in range(12)]
    sums = [sum(lengths[index] for index in evaluation._rank_indices(lengths, rank, 3)) for rank in range(3)]
    assert max(sums) - min(sums) <= 4 * 20


def test_a_prompt_too_long_names_the_example(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Catches: the example found only after the ones before it were generated."""
    long = Example("x" * 300, "", "1", "synthetic", "file.json:17")
    with pytest.raises(InputError, match=r"file\.json:17: .*context is 256"):
        evaluate(model, tokenizer, [*EXAMPLES, long], **SETTINGS)


@pytest.mark.parametrize("parse", [False, True])
def test_prompts_are_those_of_training(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, parse: bool
) -> None:
    """Catches: </s> in a question read as text in training and as EOS in evaluation, or the other way."""
    example = Example("a</s>b <s>", "It is 1.", "1", "synthetic", "s:1")
    seen: list[list[int]] = []

    def answer(
        model: object, tokenizer: object, prompts: Any, progress: Any, **_: object
    ) -> list[Generation]:
        seen.extend(prompts)
        progress({0: Generation("1", 1, True)})
        return [Generation("1", 1, True)]

    monkeypatch.setattr(evaluation, "generate", answer)
    chosen = {"parse_special_tokens": True} if parse else {}
    evaluate(model, tokenizer, [example], **SETTINGS, **chosen)
    (trained,), _ = tokenize_examples(
        [example], tokenizer, "question_answer", 500, "stop", parse_special_tokens=parse
    )
    assert seen == [trained.input_ids[: trained.prompt_length]]
    assert (tokenizer.eos_token_id in seen[0]) is parse


def test_padding_beyond_the_embedding_is_replaced_and_a_token_is_named(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Catches: `index out of range in self` where a token was added to the tokenizer and not to the model."""
    (expected,) = evaluate(model, tokenizer, EXAMPLES, **SETTINGS)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.add_tokens(["<|im_start|>"])
    (scores,) = evaluate(model, tokenizer, EXAMPLES, **SETTINGS)
    assert scores.predictions == expected.predictions
    bad = Example("<|im_start|>1 + 1?", "", "2", "synthetic", "file.json:17")
    with pytest.raises(InputError, match=r"file\.json:17: token '<\|im_start\|>' has id 101, .* 100 rows"):
        evaluate(model, tokenizer, [*EXAMPLES, bad], **SETTINGS)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    with pytest.raises(InputError, match=r"ends texts with '<\|im_end\|>', whose id 102 is beyond"):
        evaluate(model, tokenizer, EXAMPLES, **SETTINGS)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_have_no_score(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, value: float
) -> None:
    """Catches: 0.0% for a model that computes NaN, or a rank that waits for the one that saw it."""
    with torch.no_grad():
        model.model.norm.weight[3] = value
    with pytest.raises(InputError, match=r"NaN or infinite.*: model\.norm\.weight holds such values"):
        evaluate(model, tokenizer, EXAMPLES, **SETTINGS)


def test_no_examples_is_an_error(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Catches: an empty test set reported as 0%, or a division by zero."""
    with pytest.raises(InputError, match="no examples"):
        evaluate(model, tokenizer, [], **SETTINGS)


def test_progress_goes_to_stderr(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches: a bar in the output that scripts read, or no running score in it."""
    evaluate(model, tokenizer, EXAMPLES[:2], **(SETTINGS | {"show_progress": True}))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "synthetic" in captured.err
    assert "exact match" in captured.err


def test_a_mistyped_option_is_a_type_error(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Catches: a KeyError from inside, or an option that does nothing."""
    with pytest.raises(TypeError, match=r"missing or unknown: promt$"):
        evaluate(model, tokenizer, EXAMPLES, promt="alpaca", **SETTINGS)


def test_validation_examples_are_scored_as_the_training_set_says(monkeypatch):
    """Catches: answers to validation examples compared by the rule of a test set of another kind; a limit of
    the configuration that one split does not get."""
    file = {"source": "file", "path": "x.jsonl"}
    data = {"train": file | {"answer_kind": "text"}, "test": file | {"split": "test"}, "validation": 2}
    tree = {"model": {"path": "m"}, "data": data, "training": {"max_steps": 1}, "output": {"dir": "r"}}
    config = check_config(tree | {"evaluation": {"limit": 3}}, RunConfig, "test")
    seen = []

    def evaluate(model, tokenizer, examples, *, kind, **settings):
        seen.append((len(examples), kind))
        return []

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    for split in ("test", "validation"):
        evaluation.evaluate_configured(
            None, None, EXAMPLES, config, DistributedContext(), shots={}, split=split
        )
    assert seen == [(3, "numeric"), (3, "text")]
