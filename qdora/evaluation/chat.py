"""Chats with a model: turns by the template that was trained, answers shown as they are generated."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)

from qdora.config import DataConfig
from qdora.data.templates import PROMPTS
from qdora.data.tokenize import Message, chat_prompt_ids, prompt_ids
from qdora.data.vocabulary import check_ids, embedding_rows
from qdora.errors import InputError
from qdora.evaluation.generation import (
    Generation,
    LogitsWatch,
    eos_token_ids,
    evaluation_mode,
    read_answer,
    used_generation_config,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen, and how many there may be.

    Attributes:
        temperature: 0 takes the most likely token; else logits are divided by it, and one is drawn.
        top_p: draw among the most likely tokens that together have this probability.
        top_k: draw among so many; 0 for all.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    def config(self, pad_id: int, eos_ids: list[int], tokens: int) -> GenerationConfig:
        """For transformers; a model's own generation settings do not apply.

        Args:
            tokens: that may be generated.
        """
        drawn = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return GenerationConfig(
            do_sample=self.temperature > 0,
            num_beams=1,
            use_cache=True,
            max_new_tokens=tokens,
            pad_token_id=pad_id,
            eos_token_id=eos_ids or None,
            **(drawn if self.temperature > 0 else {}),
        )


@dataclass
class Chat:
    """A conversation with a model.

    Attributes:
        data: whose prompt template renders the turns.
        weights: what the model computes with in an answer: `adapters_off` for the base of an adapted one.
        system: the system turn before all others, where there is one.
        turns: so far, of users and the model in turn; none where the template holds a single question.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    data: DataConfig
    decoding: Decoding
    weights: Callable[[], AbstractContextManager[object]] = nullcontext
    system: str | None = None
    turns: list[Message] = field(default_factory=list)

    @property
    def has_turns(self) -> bool:
        """Whether the template holds several turns; else each question stands alone, as in training."""
        return PROMPTS[self.data.prompt].text is None

    def reset(self) -> None:
        """Forget all turns but the system's."""
        self.turns.clear()

    def ask(
        self, question: str, show: Callable[[str], None], stopped: Callable[[], bool] = lambda: False
    ) -> Generation:
        """Generate the answer to the next question.

        Args:
            show: gets each piece of the answer's text, as soon as it is known.
            stopped: asked after each token whether to end the answer there; what was generated is kept.
        Raises: InputError: the question cannot be rendered, or the context has no room for an answer; then
            the chat is as it was.
            NonFiniteLogitsError: of the model.
        """
        ids = self.prompt(question)
        check_ids(self.tokenizer, embedding_rows(self.model.config), [("the question", ids)])
        answer = _stream(self.model, self.tokenizer, ids, self.decoding, self.weights(), show, stopped)
        if self.has_turns:
            self.turns += [_turn("user", question), _turn("assistant", answer.text)]
        return answer

    def prompt(self, question: str) -> list[int]:
        """The token ids after which the model answers a question.

        Raises: InputError: as `prompt_ids`.
        """
        special = self.data.parse_special_tokens
        if not self.has_turns:
            return prompt_ids(self.tokenizer, self.data.prompt, [question], parse_special_tokens=special)[0]
        first = [] if self.system is None else [_turn("system", self.system)]
        turns = [*first, *self.turns, _turn("user", question)]
        return chat_prompt_ids(self.tokenizer, [turns], parse_special_tokens=special)[0]


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[int],
    decoding: Decoding,
    weights: AbstractContextManager[object],
    show: Callable[[str], None],
    stopped: Callable[[], bool],
) -> Generation:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    room = decoding.max_new_tokens if context is None else context - len(prompt)
    if room < 1:
        raise InputError(
            f"the chat has {len(prompt)} tokens with this question, but the model's context is {context}: "
            f"begin a new one with /reset, or ask a shorter question"
        )
    eos_ids = eos_token_ids(model, tokenizer)
    config = decoding.config(int(tokenizer.pad_token_id), eos_ids, min(room, decoding.max_new_tokens))
    ids_BP = torch.tensor([prompt], device=model.device)
    watch = LogitsWatch(model.device)
    call = cast("Callable[..., torch.Tensor]", model.generate)
    with weights, evaluation_mode(model), torch.no_grad(), used_generation_config(model, config):
        ids_BT = call(
            input_ids=ids_BP,
            attention_mask=torch.ones_like(ids_BP),
            streamer=_Streamer(tokenizer, show),
            logits_processor=LogitsProcessorList([watch]),
            stopping_criteria=StoppingCriteriaList([_Stopped(stopped)]),
        )
    watch.check(model)
    return read_answer(ids_BT[0, len(prompt) :].tolist(), eos_ids, tokenizer)


class _Streamer(TextStreamer):
    """Gives each piece of text to a function, without special tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: Callable[[str], None]) -> None:
        super().__init__(
            tokenizer, skip_prompt=True, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        self._show = show

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._show(text)


class _Stopped(StoppingCriteria):
    """Ends an answer where it is asked to."""

    def __init__(self, stopped: Callable[[], bool]) -> None:
        self._stopped = stopped

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full(input_ids.shape[:1], self._stopped(), dtype=torch.bool, device=input_ids.device)
