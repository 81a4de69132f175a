"""Ranking by likelihood: against the model's own logits, and against lm-evaluation-harness."""

from __future__ import annotations

import copy
import math
import random
import threading
from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import qdora.evaluation.evaluate as evaluation
from qdora.data.rows import Example
from qdora.data.templates import PROMPTS
from qdora.distributed.context import DistributedContext
from qdora.errors import InputError
from qdora.evaluation import likelihood
from qdora.evaluation.evaluate import evaluate
from qdora.evaluation.likelihood import Question, rank, read_questions, score_options
from qdora.evaluation.scores import Scores, read_scores, write_scores
from qdora.tasks import task_for
from qdora.tasks.base import Option

VOCABULARY = 99
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 3.0},
    "gemma2": {"sliding_window": 7, "final_logit_softcapping": 2.0},
    "gemma3_text": {"sliding_window": 7},
    "gpt_neox": {},
}
"""Architectures: those whose keys serve all options, those that change their logits, that slide, and one that
continuous batching does not know."""
SETTINGS: dict[str, Any] = {
    "prompt": "cloze",
    "max_new_tokens": 6,
    "batch_size": 6,
    "show_progress": False,
}


def build(kind: str, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SIZES | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def choices(count: int = 7, prefix: int = 0, longest: int = 5) -> list[Question]:
    """Random prompts of 1 to 20 tokens after a common prefix, each with 2 to 4 options."""
    chosen = random.Random(1)

    def ids(least: int, most: int) -> list[int]:
        return [chosen.randrange(VOCABULARY) for _ in range(chosen.randint(least, most))]

    shared = ids(prefix, prefix)
    return [
        Question(options, shared + ids(1, 20), [ids(1, longest) for _ in options])
        for options in ([Option(f"{i}", "x" * (1 + i)) for i in range(2 + q % 3)] for q in range(count))
    ]


def expected(model: PreTrainedModel, questions: Sequence[Question]) -> list[list[float]]:
    """Each option by itself, in float64 behind the model's own logits."""
    found = []
    for question in questions:
        sums = []
        for ids in question.continuations:
            row = torch.tensor([[*question.prompt, *ids]])
            with torch.no_grad():
                log_p = model(row, use_cache=False).logits[0].double().log_softmax(-1)
            before = len(question.prompt) - 1
            sums.append(sum(float(log_p[before + j, token]) for j, token in enumerate(ids)))
        found.append(sums)
    return found


def flat(sums: Sequence[Sequence[float]]) -> list[float]:
    return [value for of_question in sums for value in of_question]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("prefix", "longest"), [(0, 5), (30, 5), (20, 1)])
def test_sums_are_those_of_the_models_logits(kind: str, prefix: int, longest: int) -> None:
    """Catches: padding that is seen, a position or a key of another row, a token of the prompt scored or
    the first of an option not, logits that the model scales or caps, keys beyond a sliding window."""
    model, questions = build(kind, **KINDS[kind]), choices(prefix=prefix, longest=longest)
    order = [4, 0, 6, 5, 2, 1, 3]
    for batch_size in (1, 8, 99):
        sums = score_options(model, questions, order, pad_id=0, batch_size=batch_size)
        wanted = expected(model, [questions[i] for i in order])
        assert flat(sums) == pytest.approx(flat(wanted), abs=2e-4)
        assert [len(of) for of in sums] == [len(of) for of in wanted]


def test_a_prompt_is_computed_once() -> None:
    """Catches: the prompt computed for each option, or what all prompts share for each question."""
    model, questions = build("llama"), choices(prefix=30)
    widths = []
    decoder = model.get_decoder()
    with mock.patch.object(decoder, "forward", side_effect=decoder.forward) as passes:
        score_options(model, questions, range(7), pad_id=0, batch_size=8)
    for call in passes.call_args_list:
        widths.append(tuple(call.kwargs["input_ids"].shape))
    assert widths[0] == (1, 30)
    assert len(widths) == 1 + 2 * 4
    assert all(rows <= 8 and width <= 20 for rows, width in widths[1:])


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_logits_exist_for_a_chunk_of_positions(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: memory for the logits of all positions, which is more than the model's; a chunk scored with
    another's tokens."""
    model, questions = build(kind), choices()
    wanted = score_options(model, questions, range(7), pad_id=0, batch_size=99)
    monkeypatch.setattr(likelihood, "CHUNK_BYTES", 3 * 4 * VOCABULARY)
    head, seen = model.get_output_embeddings(), []
    head.register_forward_hook(lambda module, given, logits: seen.append(tuple(logits.shape)))
    sums = score_options(model, questions, range(7), pad_id=0, batch_size=99)
    assert flat(sums) == pytest.approx(flat(wanted), abs=1e-5)
    assert len(seen) > 5
    assert all(rows <= 3 for rows, _ in seen)


def test_modes_and_gradients_are_left_alone() -> None:
    """Catches: dropout in what is ranked; a model left in eval mode during training."""
    model = build("llama", attention_dropout=0.5).train()
    first = score_options(model, choices(), [0, 1], pad_id=0, batch_size=9)
    assert score_options(model, choices(), [0, 1], pad_id=0, batch_size=9) == first
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_two_scorers() -> None:
    """Catches: tokens or bytes counted for characters, the label's length for that of the ranked text, the
    smallest taken for the largest, the last of two equals."""
    options = [Option("answer1", "abcd"), Option("answer2", "äö"), Option("answer3", "abcdefgh")]
    question = Question(options, [1], [[1], [2], [3]])
    verdicts = rank(question, [-4.0, -3.0, -6.0], "answer3")
    assert list(verdicts) == ["likelihood", "likelihood_per_character"]
    assert vars(verdicts["likelihood"]) == {"extracted": "answer2", "gold": "answer3", "correct": False}
    assert verdicts["likelihood_per_character"].extracted == "answer3"
    assert verdicts["likelihood_per_character"].correct
    assert rank(question, [-4.0, -2.0, -2.0], "answer2")["likelihood"].correct


EXAMPLES = [
    Example(
        f"Is {i} {'odd' if i % 2 else 'even'} or {'x' * (i % 5)}?", text, text, "ARC-Easy", f"a:{i}", options
    )
    for i, (text, options) in enumerate(
        [
            ("two", ("one", "two", "three dogs")),
            ("it is", ("it is not", "it is")),
            ("a b c", ("a", "a b", "a b c", "d")),
            ("no", ("yes", "no")),
            ("7", ("6", "7", "88")),
        ]
    )
]


def test_ranking_generates_nothing(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Catches: seconds of generation whose answers nobody reads; a headline of a scorer that is not there;
    log-probabilities that the report loses."""
    with mock.patch.object(evaluation, "generate", side_effect=AssertionError):
        (scores,) = evaluate(model, tokenizer, EXAMPLES, method="rank", **SETTINGS)
    assert (scores.metric, scores.scorer, scores.total) == ("accuracy", "likelihood", 5)
    assert list(scores.per_scorer) == ["likelihood", "likelihood_per_character"]
    assert (scores.generated_tokens, scores.cut_off) == (0, 0)
    assert scores.decoding["method"] == "likelihood"
    assert "max_new_tokens" not in scores.decoding
    assert str(scores).startswith("ARC-Easy: accuracy ")
    for prediction, example in zip(scores.predictions, EXAMPLES, strict=True):
        assert prediction.output == ""
        assert [option.text for option in prediction.options] == list(example.options)
        best = max(prediction.options, key=lambda option: option.log_probability)
        assert prediction.extracted == best.answer
        assert prediction.correct == (best.answer == example.answer)
        assert prediction.prompt.endswith(f"Question: {example.question}\nAnswer:")


def test_both_methods_stand_side_by_side(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Any
) -> None:
    """Catches: verdicts of one method lost to the other, or another headline than that of generation."""
    (ranked,) = evaluate(model, tokenizer, EXAMPLES, method="rank", **SETTINGS)
    (generated,) = evaluate(model, tokenizer, EXAMPLES, **SETTINGS)
    (both,) = evaluate(model, tokenizer, EXAMPLES, method="both", **SETTINGS)
    assert both.per_scorer == generated.per_scorer | ranked.per_scorer
    assert (both.scorer, both.metric) == ("first_answer_word", "exact_match")
    assert [p.output for p in both.predictions] == [p.output for p in generated.predictions]
    assert [p.options for p in both.predictions] == [p.options for p in ranked.predictions]
    assert read_scores(write_scores(both, tmp_path)) == both


def test_answers_without_options_are_refused(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Catches: a number ranked among nothing, after minutes of generation."""
    numeric = Example("1 + 1?", "2", "2", "synthetic", "s:1")
    for method in ("rank", "both"):
        with pytest.raises(
            InputError, match=f"{method}' ranks .* 'synthetic' are numeric; allowed there: gen"
        ):
            evaluate(model, tokenizer, [*EXAMPLES, numeric], method=method, **SETTINGS)  # type: ignore[arg-type]
    lone = Example("Q", "x", "x", "ARC-Easy", "a:9", ("x",))
    with pytest.raises(InputError, match=r"a:9: a choice needs at least two options"):
        evaluate(model, tokenizer, [lone], method="rank", **SETTINGS)


def test_own_data_have_their_answer_words_as_options(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Catches: a user's own choice that cannot be ranked."""
    examples = [
        Example(f"Q{i}", f"I say {a}.", a, "mine", f"m:{i}") for i, a in enumerate(("yes", "no", "no"))
    ]
    (scores,) = evaluate(model, tokenizer, examples, kind="choice", method="rank", **SETTINGS)
    assert {option.text for p in scores.predictions for option in p.options} == {"yes", "no"}


def test_a_question_too_long_is_named(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Catches: an option cut off at the end of the context, or positions that the model was never given."""
    long = Example("x" * 200, "y" * 50, "y" * 50, "ARC-Easy", "file.json:17", ("y" * 50, "no"))
    with pytest.raises(InputError, match=r"file\.json:17: .* longest option 51: .*context is 256"):
        evaluate(model, tokenizer, [*EXAMPLES, long], method="rank", **SETTINGS)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_numbers_have_no_rank(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, value: float
) -> None:
    """Catches: the first option chosen every time, and 25% reported, for a model that computes NaN."""
    with torch.no_grad():
        model.model.norm.weight[3] = value
    with pytest.raises(InputError, match=r"NaN or infinite.*: model\.norm\.weight holds such values"):
        evaluate(model, tokenizer, EXAMPLES, method="rank", **SETTINGS)


@pytest.mark.parametrize("count", [2, 3])
def test_ranks_agree_with_one(
    count: int, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Catches: questions lost or ranked twice, ranks that return different scores."""
    (alone,) = evaluate(model, tokenizer, EXAMPLES, method="rank", **SETTINGS)
    barrier = threading.Barrier(count, timeout=300)
    slots: list[list[Any]] = [[] for _ in range(count)]
    results: list[list[Scores]] = [[] for _ in range(count)]

    def process(number: int) -> None:
        def gather(own: list[Any]) -> list[Any]:
            slots[number] = own
            barrier.wait()
            joined = [item for slot in slots for item in slot]
            barrier.wait()
            return joined

        context = DistributedContext(number, count)
        context.gather = gather  # type: ignore[method-assign]
        own_model, own_tokenizer = copy.deepcopy(model), copy.deepcopy(tokenizer)
        results[number] = evaluate(
            own_model, own_tokenizer, EXAMPLES, method="rank", context=context, **SETTINGS
        )

    threads = [threading.Thread(target=process, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wanted = [o.log_probability for p in alone.predictions for o in p.options]
    for (scores,) in results:
        assert [p.correct for p in scores.predictions] == [p.correct for p in alone.predictions]
        found = [o.log_probability for p in scores.predictions for o in p.options]
        assert found == pytest.approx(wanted, abs=1e-5)


class Harness:
    """lm-evaluation-harness' HFLM on a model of ours."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM

        self.instance = Instance
        self.lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, add_bos_token=True)

    def sums(self, context: str, continuations: Sequence[str]) -> list[float]:
        requests = [
            self.instance("loglikelihood", {}, (context, text), i) for i, text in enumerate(continuations)
        ]
        return [value for value, _ in self.lm.loglikelihood(requests, disable_tqdm=True)]


@pytest.fixture
def harness_is_there() -> None:
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install lm_eval")


@pytest.mark.parametrize("prompt", ["cloze", "question_answer", "alpaca"])
def test_agreement_with_lm_evaluation_harness(
    prompt: str, harness_is_there: None, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Catches: another division of the text between prompt and option, other tokens, another sum, another
    length or another choice than in the published figures."""
    model.config.max_position_embeddings = 512
    shots = [("Is it?", "it is")]
    task, harness = task_for("ARC-Easy"), Harness(model, tokenizer)
    questions = read_questions(tokenizer, task, EXAMPLES, prompt, shots=shots)
    ours = score_options(model, questions, range(len(questions)), pad_id=0, batch_size=7)
    for example, question, sums in zip(EXAMPLES, questions, ours, strict=True):
        text = PROMPTS[prompt].render(example.question, shots)
        context = text.rstrip(" ")
        space = text[len(context) :]
        theirs = harness.sums(context, [space + option for option in example.options])
        assert sums == pytest.approx(theirs, abs=1e-4)
        verdicts = rank(question, sums, example.answer)
        lengths = [len(option) for option in example.options]
        best = max(range(len(theirs)), key=theirs.__getitem__)
        best_norm = max(range(len(theirs)), key=lambda i: theirs[i] / lengths[i])
        assert verdicts["likelihood"].extracted == example.options[best]
        assert verdicts["likelihood_per_character"].extracted == example.options[best_norm]
        assert all(math.isfinite(value) for value in theirs)
