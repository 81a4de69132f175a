"""Continuous batching against transformers' `generate`, on small random models of each architecture."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, OPTConfig, PreTrainedModel, PreTrainedTokenizerFast

from qdora.evaluation import continuous
from qdora.evaluation.continuous import MODEL_TYPES, why_not
from qdora.evaluation.generation import Generation, NonFiniteLogitsError, generate

VOCABULARY = 99
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,  # tied ones of random models repeat their input
}
WINDOWS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 7},
    "qwen2": {
        "use_sliding_window": True,
        "sliding_window": 7,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
    },
    "qwen3": {
        "use_sliding_window": True,
        "sliding_window": 7,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
    },
    "gemma2": {"sliding_window": 7},
    "gemma3_text": {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "phi3": {"sliding_window": 7},
    "starcoder2": {"sliding_window": 7},
}
"""Settings of architectures that can slide, with a window that prompts and answers exceed."""

CASES = [(kind, {}) for kind in MODEL_TYPES] + list(WINDOWS.items())


def build(kind: str, attention: str | None = None, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(SIZES | changes))
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms: their scale tells their positions apart
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def prompts(count: int = 11, prefix: int = 0, seed: int = 0) -> list[list[int]]:
    """Random ones of 1 to 30 tokens after a common prefix."""
    chosen = random.Random(seed)
    shared = [chosen.randrange(VOCABULARY) for _ in range(prefix)]
    return [
        shared + [chosen.randrange(VOCABULARY) for _ in range(chosen.randint(1, 30))] for _ in range(count)
    ]


def run(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, given: list[list[int]], **changes: Any
) -> list[Generation]:
    settings = {"pad_id": 0, "max_new_tokens": 14, "batch_size": 4}
    return generate(model, tokenizer, given, **(settings | changes))


def by_transformers(model: PreTrainedModel, *arguments: Any, **changes: Any) -> list[Generation]:
    """The same through `model.generate`."""
    with mock.patch.object(continuous, "why_not", return_value="to compare"):
        return run(model, *arguments, **changes)


def choose_eos(model: PreTrainedModel, tokenizer: Any, given: list[list[int]], **changes: Any) -> None:
    """Have answers end at different times, some of them at the limit."""
    model.generation_config.eos_token_id = None
    answers: list[list[int]] = []
    with mock.patch.object(tokenizer, "decode", lambda ids, **_: answers.append(ids)):
        by_transformers(model, tokenizer, given, **changes)
    chosen: set[int] = set()
    of_token = {token: [ids for ids in answers if token in ids] for ids in answers for token in ids}
    for token in sorted(of_token, key=lambda token: (len(of_token[token]), token)):
        ended = sum(bool({token, *chosen} & set(ids)) for ids in answers)
        if ended <= len(answers) * 2 // 3:
            chosen.add(token)
    model.generation_config.eos_token_id = sorted(chosen)


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A LLaMA whose answers have 1 to 14 tokens."""
    made = build("llama")
    choose_eos(made, tokenizer, prompts())
    return made


@pytest.mark.parametrize(("kind", "changes"), CASES, ids=[f"{k}{'-window' * bool(c)}" for k, c in CASES])
@pytest.mark.parametrize("prefix", [0, 20])
def test_answers_are_those_of_transformers(
    kind: str, changes: dict[str, Any], prefix: int, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Catches: wrong positions, masks, rows or columns of the cache in any architecture of the list: for
    grouped queries, a sliding window that is shorter than the prompts, several kinds of layers."""
    model, given = build(kind, **changes), prompts(prefix=prefix)
    assert why_not(model) is None
    choose_eos(model, tokenizer, given)
    expected = by_transformers(model, tokenizer, given)
    assert len({(answer.tokens, answer.stopped) for answer in expected}) > 2
    assert {answer.stopped for answer in expected} == {True, False}
    for batch_size in (1, 4, 11):
        assert run(model, tokenizer, given, batch_size=batch_size) == expected


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_way_to_mask(attention: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """Catches: a mask of truth values added to scores; a row of padding alone that makes NaN of others."""
    model = build("llama", attention)
    choose_eos(model, tokenizer, prompts())
    assert run(model, tokenizer, prompts()) == by_transformers(model, tokenizer, prompts())


@pytest.mark.parametrize(("long", "least"), [(120, 1), (20, 4)])
def test_columns_and_rows_move(
    long: int, least: int, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Catches: a sequence overwritten as the columns move to the left, or by a row that takes its place."""
    chosen = random.Random(3)
    given = [*prompts(60, seed=1), [chosen.randrange(VOCABULARY) for _ in range(long)]]
    choose_eos(model, tokenizer, given, max_new_tokens=30)
    cache = continuous._SlotCache
    with (
        mock.patch.object(continuous, "SPARE_COLUMNS", 3),
        mock.patch.object(cache, "move_left", autospec=True, side_effect=cache.move_left) as moves,
        mock.patch.object(cache, "move_row", autospec=True, side_effect=cache.move_row) as rows,
    ):
        got = run(model, tokenizer, given, max_new_tokens=30)
    assert got == by_transformers(model, tokenizer, given, max_new_tokens=30)
    assert moves.call_count >= least
    assert rows.call_count > 3


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """Rows and tokens of each pass."""
    seen: list[tuple[int, int]] = []
    original = continuous.Batch._pass

    def observed(batch: continuous.Batch, ids_NQ: torch.Tensor, more: dict[str, Any]) -> torch.Tensor:
        seen.append((ids_NQ.shape[0], ids_NQ.shape[1]))
        return original(batch, ids_NQ, more)

    monkeypatch.setattr(continuous.Batch, "_pass", observed)
    return seen


def test_places_are_taken_and_given_up(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, passes: list[tuple[int, int]]
) -> None:
    """Catches: finished sequences that are computed on, prompts that wait for the whole batch to finish."""
    given = prompts(24)
    answers = run(model, tokenizer, given, batch_size=4)
    steps = [rows for rows, tokens in passes if tokens == 1]
    # One token of each answer comes of the pass over its prompt, each of the others of a row of a step.
    short = sum(len(prompt) == 1 for prompt in given)
    assert sum(steps) == sum(answer.tokens - 1 for answer in answers) + short
    by_four = sorted(range(24), key=lambda i: -len(given[i]))
    waited = sum(max(answers[i].tokens for i in by_four[at : at + 4]) - 1 for at in range(0, 24, 4))
    assert len(steps) - short < 0.9 * waited
    assert max(steps) == 4


def test_a_shared_prefix_is_computed_once(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, passes: list[tuple[int, int]]
) -> None:
    """Catches: the examples of a few-shot prompt computed anew for each question."""
    given = prompts(8, prefix=50)
    run(model, tokenizer, given, batch_size=4, max_new_tokens=1)
    assert passes[0] == (1, 50)
    assert all(tokens <= 30 for _, tokens in passes[1:])
    passes.clear()
    run(model, tokenizer, [*given, [7, 7]], batch_size=4, max_new_tokens=1)
    assert max(tokens for _, tokens in passes) == max(map(len, given))


@pytest.mark.parametrize(
    ("given", "shared"),
    [
        ([[1] * 40, [1] * 30 + [2]], 30),
        ([[1] * 40, [1] * 40], 39),
        ([[1] * 17, [1] * 40], 16),
        ([[1] * 16, [1] * 40], 0),  # the last token of each prompt is computed
        ([[1] * 40], 0),
        ([[2, *[1] * 40], [1] * 40], 0),
        ([], 0),
    ],
)
def test_the_common_prefix(given: list[list[int]], shared: int) -> None:
    """Catches: a prefix that takes a whole prompt, whose next token nothing would tell; one that does not
    pay."""
    assert continuous.common_prefix(given) == shared


def test_the_device_is_not_asked_at_each_step(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: a GPU that waits for the host after every token; tokens after EOS, or beyond the limit,
    where the host looks late."""
    given, looks = prompts(13), 0
    expected = by_transformers(model, tokenizer, given)
    original = continuous.Batch.__init__

    def as_on_a_gpu(batch: continuous.Batch, *arguments: Any, **rest: Any) -> None:
        original(batch, *arguments, **rest)
        batch.steps_between_looks = 5

    def counted(tensor: torch.Tensor) -> Any:
        nonlocal looks
        looks += 1
        return to_list(tensor)

    to_list = torch.Tensor.tolist
    monkeypatch.setattr(continuous.Batch, "__init__", as_on_a_gpu)
    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    monkeypatch.setattr(continuous, "SPARE_COLUMNS", 6)
    assert run(model, tokenizer, given) == expected
    late, looks = looks, 0
    model.generation_config.eos_token_id = None
    run(model, tokenizer, given)
    assert late < looks  # who has ended leaves when the host looks, not at the limit
    looks = 0
    run(model, tokenizer, given[:4], max_new_tokens=16)
    assert looks == 1 + 3
    assert late < sum(answer.tokens for answer in expected) / 4 + 13


def test_the_cache_is_as_large_as_the_batch_and_goes_with_it(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Catches: a cache that grows with the prompts that have been there, or stays after the answers."""
    given, caches = prompts(40), []
    original = continuous._SlotCache.__init__

    def kept(cache: continuous._SlotCache, *arguments: Any) -> None:
        original(cache, *arguments)
        caches.append(cache)

    with mock.patch.object(continuous._SlotCache, "__init__", kept):
        run(model, tokenizer, given, batch_size=3)
    (cache,) = caches
    shapes = {tuple(tensor.shape) for tensor in cache.tensors()}
    assert shapes == {(3, 2, max(map(len, given)) + 14 + continuous.SPARE_COLUMNS, 8)}


def test_what_is_not_known_goes_through_transformers(tokenizer: PreTrainedTokenizerFast) -> None:
    """Catches: other answers, without a word, of an architecture that nobody has tried: OPT's positions are
    learned, and a rotary embedding may depend on the longest sequence of a batch."""
    opt = AutoModelForCausalLM.from_config(
        OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=32,
            max_position_embeddings=128,
        )
    )
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    dynamic = build("llama", rope_parameters=rope)
    assert why_not(opt) == "opt is not among the architectures that are known to allow it"
    assert why_not(dynamic) == "rotary embeddings of type dynamic depend on the longest sequence of a batch"
    for model in (opt, dynamic):
        with mock.patch.object(model, "generate", wraps=model.generate) as called:
            run(model, tokenizer, prompts(5))
        assert called.call_count == 2


def test_logits_that_are_no_numbers_are_noticed(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Catches: an answer made of NaN, in a step after the prompt's pass."""
    calls = 0

    def spoil(module: object, arguments: object, output: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return output * torch.nan if calls == 4 else output

    model.lm_head.register_forward_hook(spoil)
    with pytest.raises(NonFiniteLogitsError, match="overflows"):
        run(model, tokenizer, prompts())


def in_ranks(work: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, count: int = 2) -> None:
    """Run threads that stand for ranks, with an all-reduce that waits for all."""
    barrier, slots = threading.Barrier(count, timeout=60), [0] * count
    ranks = threading.local()

    def all_reduce(tensor: torch.Tensor) -> None:
        slots[ranks.own] = int(tensor)
        barrier.wait()
        total = sum(slots)
        barrier.wait()
        tensor.fill_(total)

    def process(rank: int) -> None:
        ranks.own = rank
        try:
            work(rank)
        except BaseException:
            barrier.abort()
            raise

    monkeypatch.setattr(continuous.dist, "all_reduce", all_reduce)
    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_ranks_call_a_sharded_model_equally_often(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: a deadlock of a sharded model where one rank has more prompts, or longer answers."""
    given = [prompts(9, prefix=20, seed=1), prompts(4, seed=2), []]
    models = [build("llama") for _ in given]
    choose_eos(models[0], tokenizer, prompts())
    calls, got, expected = [0] * 3, [[]] * 3, []
    for rank, model in enumerate(models):
        model.generation_config.eos_token_id = models[0].generation_config.eos_token_id
        expected.append(by_transformers(model, tokenizer, given[rank]))

        def count(*_: object, rank: int = rank) -> None:
            calls[rank] += 1

        model.register_forward_hook(count)

    def work(rank: int) -> None:
        got[rank] = run(models[rank], tokenizer, given[rank], synced=True)

    in_ranks(work, monkeypatch, 3)
    assert got == expected
    assert len(set(calls)) == 1
