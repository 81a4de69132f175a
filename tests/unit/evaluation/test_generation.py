"""Generation with a tiny random LLaMA."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping

import pytest
import torch
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qdora.data.padding import eos_token_ids
from qdora.errors import InputError
from qdora.evaluation.generation import Generation, generate

TEXTS = [
    "2+2=",
    "Tom has 12 pens and buys 30 more. How many?",
    "x",
    "How many legs have 4 cats?",
    "abc abc abc",
]


@pytest.fixture
def prompts(tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    return [tokenizer(text)["input_ids"] for text in TEXTS]


def run(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]], **changes: object
) -> list[Generation]:
    settings: dict[str, object] = {"pad_id": 0, "max_new_tokens": 12, "batch_size": 2}
    return generate(model, tokenizer, prompts, **(settings | changes))  # type: ignore[arg-type]


def by_hand(model: LlamaForCausalLM, prompt: list[int], steps: int) -> list[int]:
    """Argmax of a plain forward pass, without cache, padding or transformers' generate."""
    ids = list(prompt)
    model.eval()
    for _ in range(steps):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_batched_is_one_by_one(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]]
) -> None:
    """Catches: right padding, a missing mask, wrong positions, answers given to another prompt."""
    expected = [tokenizer.decode(by_hand(model, p, 12), skip_special_tokens=True) for p in prompts]
    assert len(set(expected)) > 3
    for batch_size in (1, 2, 5):
        outputs = run(model, tokenizer, prompts, batch_size=batch_size)
        assert [output.text for output in outputs] == expected
        assert all(output.tokens == 12 and not output.stopped for output in outputs)


def test_longest_prompts_come_first(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]]
) -> None:
    """Catches: running out of memory at the end of a long evaluation, progress that misses prompts."""
    seen: list[Mapping[int, Generation]] = []
    outputs = run(model, tokenizer, prompts, progress=seen.append)
    assert [list(batch) for batch in seen] == [[1, 3], [4, 0], [2]]
    assert {i: g for batch in seen for i, g in batch.items()} == dict(enumerate(outputs))


def test_eos_of_the_model_stops(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]]
) -> None:
    """Catches: only the tokenizer's EOS honoured, where chat models end with another; EOS in the text."""
    for own_eos in ([], [tokenizer.convert_tokens_to_ids("@")]):
        ids = by_hand(model, prompts[1], 12)
        stop = ids[3]
        model.generation_config.eos_token_id = [*own_eos, stop]
        assert stop in eos_token_ids(model, tokenizer)
        assert tokenizer.eos_token_id in eos_token_ids(model, tokenizer)
        output = run(model, tokenizer, prompts)[1]
        length = ids.index(stop)
        assert output == Generation(tokenizer.decode(ids[:length]), length + 1, True)


def test_eos_may_be_the_pad_token(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]]
) -> None:
    """Catches: padding cut off by its id, which would cut an answer or count padding as tokens."""
    stop = by_hand(model, prompts[1], 4)[3]
    model.generation_config.eos_token_id = stop
    padded_with_eos = run(model, tokenizer, prompts, pad_id=stop)
    assert padded_with_eos == run(model, tokenizer, prompts, pad_id=0)


LEAKS = {
    "do_sample": True,
    "temperature": 5.0,
    "top_k": 3,
    "repetition_penalty": 50.0,
    "no_repeat_ngram_size": 1,
    "max_length": 5,
    "min_new_tokens": 12,
    "num_beams": 4,
    "suppress_tokens": [40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50],
}


@pytest.mark.parametrize("setting", LEAKS)
def test_the_models_own_settings_do_not_leak(
    setting: str, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]]
) -> None:
    """Catches: scores that depend on a checkpoint's generation_config.json."""
    expected = run(model, tokenizer, prompts)
    own = GenerationConfig(**{setting: LEAKS[setting]})
    model.generation_config = own
    assert run(model, tokenizer, prompts) == expected
    assert model.generation_config is own


def test_no_warnings(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[list[int]],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches: warnings between the lines of the progress bar."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.7, top_p=0.9, max_length=99)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(model, tokenizer, prompts)
    assert not caplog.records


@pytest.mark.parametrize(("new", "fits"), [(256 - 43, True), (256 - 42, False)])
def test_context_is_checked_before_starting(
    new: int,
    fits: bool,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches: positions beyond the context, garbage without an error, found after hours."""
    assert len(prompts[1]) == 43
    calls: list[object] = []

    def stop_here(**inputs: object) -> None:
        calls.append(inputs)
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "forward", stop_here)
    with pytest.raises(KeyboardInterrupt if fits else InputError, match=None if fits else r"prompt 1 .*256"):
        run(model, tokenizer, prompts, max_new_tokens=new)
    assert bool(calls) is fits


def test_an_empty_prompt_is_refused(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Catches: a row that is all padding."""
    with pytest.raises(InputError, match="prompt 1 has no tokens"):
        run(model, tokenizer, [[5], []])


def test_no_prompts(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Catches: a crash on a process whose share is empty."""
    assert run(model, tokenizer, []) == []


@pytest.mark.parametrize("fails", [False, True])
def test_modes_are_restored(
    fails: bool,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches: dropout active in generation, or switched off for the rest of the training."""
    model.train()
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    during: list[tuple[bool, bool, bool]] = []

    def observe(*_: object) -> None:
        modes = (model.training, torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        during.append(modes)
        if fails:
            raise MemoryError

    model.model.layers[1].register_forward_hook(observe)
    if fails:
        with pytest.raises(MemoryError):
            run(model, tokenizer, prompts)
    else:
        run(model, tokenizer, prompts)
    # Inference mode would forbid counting parameter versions, which adapters do.
    assert set(during) == {(False, False, False)}
    assert {name: module.training for name, module in model.named_modules()} == before
