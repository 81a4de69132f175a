"""Chats: turns as the template has them, answers as generation has them, the base beside the adapter."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from qdora.adapters.inject import adapted_layers, adapters_off, inject
from qdora.config import DataConfig, DatasetConfig
from qdora.errors import InputError
from qdora.evaluation.chat import Chat, Decoding
from qdora.evaluation.generation import generate
from qdora.models.load import load_base
from tests.axes import adapter_config
from tests.unit.adapters.oracle import move_off_the_identity

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def adapted(tiny_model_folder: Path) -> Any:
    """An adapted model that differs from its base, and its tokenizer with a chat template."""
    model, tokenizer = load_base(tiny_model_folder)
    assert tokenizer is not None
    tokenizer.chat_template = TEMPLATE
    inject(model, adapter_config(r=4, alpha=11.0))
    for seed, layer in enumerate(adapted_layers(model).values()):
        move_off_the_identity(layer, seed)
    return model, tokenizer


def data(prompt: Any) -> DataConfig:
    test = DatasetConfig(source="synthetic", count=1)
    return DataConfig(train=test, test=test, prompt=prompt)


def chat(adapted: Any, prompt: str = "chat", **changes: Any) -> Chat:
    model, tokenizer = adapted
    return Chat(model, tokenizer, data(prompt), Decoding(12), **changes)


def ignore(_: str) -> None:
    pass


def test_turns_are_rendered_by_the_template(adapted: Any) -> None:
    """Catches: a turn that is forgotten, a system turn in the wrong place, an answer put back with other
    text than was shown, a reset that keeps turns or forgets the system turn."""
    talk, tokenizer = chat(adapted), adapted[1]
    talk.system = "be brief"
    first = talk.ask("one?", ignore).text
    messages = [("system", "be brief"), ("user", "one?"), ("assistant", first), ("user", "two?")]
    rendered = "".join(f"<{role}>{text}\n" for role, text in messages) + "<assistant>"
    assert tokenizer.decode(talk.prompt("two?")) == rendered
    talk.reset()
    assert tokenizer.decode(talk.prompt("two?")) == "<system>be brief\n<user>two?\n<assistant>"


@pytest.mark.parametrize("prompt", ["chat", "question_answer"])
def test_an_answer_is_what_generation_writes(adapted: Any, prompt: str) -> None:
    """Catches: a chat that decodes otherwise than evaluation does, a lost or doubled piece of the text, the
    model's own generation settings at work, a single question's template given the turns before."""
    model, tokenizer = adapted
    talk, shown = chat(adapted, prompt), list[str]()
    model.generation_config.repetition_penalty = 5.0
    try:
        talk.ask("Zero", ignore)
        talk.reset()
        answer = talk.ask("What is 3 + 4?", shown.append)
    finally:
        model.generation_config.repetition_penalty = None
    ids = Chat(model, tokenizer, data(prompt), Decoding(12)).prompt("What is 3 + 4?")
    (expected,) = generate(model, tokenizer, [ids], pad_id=0, max_new_tokens=12, batch_size=1)
    assert answer == expected
    assert "".join(shown) == answer.text
    assert answer.tokens == 12 or answer.stopped
    assert bool(talk.turns) is (prompt == "chat")


def test_the_base_answers_with_the_adapter_off(adapted: Any, tiny_model_folder: Path) -> None:
    """Catches: a base that still has the adapter, or an adapter that stays off after the base's answer."""
    model, tokenizer = adapted
    talk, base = chat(adapted), chat(adapted, weights=partial(adapters_off, model))
    before = talk.ask("who?", ignore).text
    of_base = base.ask("who?", ignore).text
    plain, _ = load_base(tiny_model_folder)
    alone = Chat(plain, tokenizer, data("chat"), Decoding(12))
    assert of_base == alone.ask("who?", ignore).text != before
    talk.reset()
    assert talk.ask("who?", ignore).text == before


def test_an_answer_ends_where_it_is_stopped(adapted: Any) -> None:
    """Catches: Ctrl-C that waits for the end of the answer, or loses what was written until then."""
    talk, calls = chat(adapted), list[int]()
    full = talk.ask("who?", ignore)
    talk.reset()
    cut = talk.ask("who?", ignore, lambda: calls.append(1) or len(calls) == 3)
    assert cut.tokens == 3 < full.tokens
    assert full.text.startswith(cut.text)
    assert talk.turns[-1]["content"] == cut.text


def test_draws_follow_seed_and_temperature(adapted: Any) -> None:
    """Catches: a temperature, top_p or top_k that does nothing, draws that a seed does not repeat."""
    model, tokenizer = adapted

    def drawn(seed: int, **how: Any) -> str:
        torch.manual_seed(seed)
        return Chat(model, tokenizer, data("chat"), Decoding(12, **how)).ask("who?", ignore).text

    greedy = drawn(0)
    assert drawn(1, temperature=2.0) == drawn(1, temperature=2.0) != drawn(2, temperature=2.0)
    assert drawn(1, temperature=2.0) != greedy
    assert drawn(1, temperature=1e-4) == drawn(1, temperature=9.0, top_k=1) == greedy
    assert drawn(1, temperature=2.0, top_p=1e-6) == greedy


def test_a_full_context_and_a_bad_question_leave_the_chat_as_it_was(adapted: Any) -> None:
    """Catches: a chat that ends when its context is full, an answer beyond the context, a half-made turn."""
    talk = chat(adapted)
    room = 512 - len(talk.prompt(""))
    assert talk.ask("a" * (room - 2), ignore).tokens <= 2
    turns = list(talk.turns)
    with pytest.raises(InputError, match=r"the model's context is 512: begin a new one with /reset"):
        talk.ask("b", ignore)
    assert talk.turns == turns
