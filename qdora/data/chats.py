"""Chats as token ids, and which of them are trained.

What an assistant says is told by the `{% generation %}` marks of the chat template, where it has them.
Else by its renderings: the turns before an answer, with the header of the answer, and the turns up to it must
both be beginnings of the rendered chat, in tokens. So the tokens before an answer in training are those after
which a server lets the model write it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from jinja2 import TemplateError

from qdora.config import LossOn
from qdora.data.rows import Turn, last_answer
from qdora.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
"""The position of a first token, and the one behind the last."""

_MARKS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_NO_CHOICE = "set data.chat_template to a template with {% generation %} marks, or data.loss_on: last or all"


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """The ids of a chat, and the spans of them that are trained, in order; at least one."""

    ids: list[int]
    spans: list[Span]


def messages(turns: Iterable[Turn]) -> list[dict[str, str]]:
    """Turns as a chat template takes them."""
    return [{"role": turn.role, "content": turn.content} for turn in turns]


def require_chat_template(tokenizer: PreTrainedTokenizerBase, others: Iterable[str] = ()) -> None:
    """Check that there is a template.

    Args:
        others: prompts that need none.
    Raises: InputError: there is none; says what to set.
    """
    if not tokenizer.chat_template:
        instead = f"; use one of: {', '.join(others)};" if others else ";"
        raise InputError(
            f"prompt 'chat': this tokenizer has no chat template{instead} or give it one by "
            "data.chat_template: llama3, chatml, plain, or a file"
        )


def render_chats(
    tokenizer: PreTrainedTokenizerBase,
    chats: Sequence[Sequence[Turn]],
    as_text: Sequence[bool],
    loss_on: LossOn,
) -> list[RenderedChat | str]:
    """Each chat as the tokenizer's template renders it, or the reason for which it cannot be trained on.

    Args:
        as_text: of each chat, whether the text of special tokens in its turns is ordinary text.
        loss_on: what is trained.
    Raises: InputError: the tokenizer has no chat template.
    """
    require_chat_template(tokenizer)
    chosen = [_trained_turns(chat, loss_on) for chat in chats]
    marked = _has_marks(tokenizer) and loss_on != "all"
    by_marks = [i for i, text in enumerate(as_text) if marked and not text]
    found = _renderings(tokenizer, chats, as_text, chosen, {*by_marks}, loss_on)
    masks = dict(zip(by_marks, _masks(tokenizer, [chats[i] for i in by_marks]), strict=True))
    rendered: list[RenderedChat | str] = []
    for i, (chat, turns) in enumerate(zip(chats, chosen, strict=True)):
        if not turns:
            rendered.append("no assistant turn is trained")
            continue
        full_ids = found[i, len(chat), False]
        if isinstance(full_ids, str):
            rendered.append(f"the chat template refuses it: {full_ids}")
            continue
        if (lost := _left_out(tokenizer, chat, turns)) is not None:
            rendered.append(_says_left_out(chat, lost))
            continue
        spans: list[Span] | str
        if loss_on == "all":
            spans = [(1, len(full_ids))]  # nothing comes before the first token
        elif i in masks:
            spans = _spans_of_mask(chat, turns, masks[i])
        else:
            spans = _spans_of_beginnings(i, chat, turns, full_ids, found)
        if loss_on != "all" and not isinstance(spans, str):
            spans = _ended(tokenizer, full_ids, spans, chat, turns, i in masks)
        rendered.append(spans if isinstance(spans, str) else RenderedChat(full_ids, spans))
    return rendered


def _has_marks(tokenizer: PreTrainedTokenizerBase) -> bool:
    return _MARKS.search(tokenizer.get_chat_template()) is not None


def _trained_turns(chat: Sequence[Turn], loss_on: LossOn) -> list[int]:
    """Indices of the assistant turns that are trained."""
    if loss_on == "last":
        last = last_answer(chat)
        return [last] if chat[last].trained else []
    return [i for i, turn in enumerate(chat) if turn.role == "assistant" and turn.trained]


Rendering = tuple[int, int, bool]
"""Which chat, how many of its turns, and whether the header of the answer to them follows."""


def _renderings(
    tokenizer: PreTrainedTokenizerBase,
    chats: Sequence[Sequence[Turn]],
    as_text: Sequence[bool],
    chosen: Sequence[Sequence[int]],
    by_marks: set[int],
    loss_on: LossOn,
) -> Mapping[Rendering, list[int] | str]:
    """The ids of all chats, and of their beginnings that are compared with them; or why there are none."""
    wanted: dict[Rendering, None] = {}
    for i, chat in enumerate(chats):
        wanted[i, len(chat), False] = None
        if loss_on == "all" or i in by_marks:
            continue
        for turn in chosen[i]:
            wanted[i, turn, True] = None
            wanted[i, turn + 1, False] = None
    found: dict[Rendering, list[int] | str] = {}
    for header in (False, True):
        for text in (False, True):
            keys = [key for key in wanted if key[2] == header and as_text[key[0]] == text]
            beginnings = [messages(chats[i][:count]) for i, count, _ in keys]
            found.update(zip(keys, _encode(tokenizer, beginnings, header, text), strict=True))
    return found


def _encode(
    tokenizer: PreTrainedTokenizerBase, chats: list[list[dict[str, str]]], header: bool, as_text: bool
) -> list[list[int] | str]:
    """The ids of each; the reason of a chat that the template refuses."""
    if not all(chats):
        return [
            _encode(tokenizer, [chat], header, as_text)[0] if chat else "there is no turn" for chat in chats
        ]
    if not chats:
        return []
    try:
        ids = tokenizer.apply_chat_template(
            chats,
            add_generation_prompt=header,
            tokenize=True,
            return_dict=False,
            sanitize_control_tokens=as_text,
            tokenizer_kwargs={"split_special_tokens": False},
        )
    except (TemplateError, ValueError) as error:  # ValueError: a token that cannot be text
        if len(chats) == 1:
            return [" ".join(str(error).split())]
        return [_encode(tokenizer, [chat], header, as_text)[0] for chat in chats]
    return cast("list[list[int] | str]", ids)


def _masks(tokenizer: PreTrainedTokenizerBase, chats: list[Sequence[Turn]]) -> list[list[int]]:
    """Of each chat 1 for the tokens that the template marks; empty where the template refuses it."""
    if not chats:
        return []
    try:
        encoded: Any = tokenizer.apply_chat_template(
            [messages(chat) for chat in chats],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"split_special_tokens": False},
        )
    except TemplateError:
        return [[]] if len(chats) == 1 else [_masks(tokenizer, [chat])[0] for chat in chats]
    return cast("list[list[int]]", encoded["assistant_masks"])


def _spans_of_mask(chat: Sequence[Turn], turns: Sequence[int], mask: Sequence[int]) -> list[Span] | str:
    edges = [i for i in range(len(mask) + 1) if (mask[i : i + 1] == [1]) != (i > 0 and mask[i - 1] == 1)]
    runs = list(zip(edges[::2], edges[1::2], strict=True))
    answers = [i for i, turn in enumerate(chat) if turn.role == "assistant"]
    if len(runs) != len(answers):
        return (
            f"the chat template's {{% generation %}} marks are around {len(runs)} turns, and the chat has "
            f"{len(answers)} of an assistant; mend the marks, or set data.chat_template to another template"
        )
    return [run for run, turn in zip(runs, answers, strict=True) if turn in turns]


def _spans_of_beginnings(
    chat_index: int,
    chat: Sequence[Turn],
    turns: Sequence[int],
    full_ids: Sequence[int],
    found: Mapping[Rendering, list[int] | str],
) -> list[Span] | str:
    spans = []
    for turn in turns:
        before, up_to = found[chat_index, turn, True], found[chat_index, turn + 1, False]
        if isinstance(before, str):
            return f"the chat template renders no question before turn {turn + 1} (assistant): {before}"
        if isinstance(up_to, str):
            return f"the chat template refuses the chat up to turn {turn + 1} (assistant): {up_to}"
        for part, ids in (("before", before), ("up to", up_to)):
            if full_ids[: len(ids)] != ids:
                return (
                    f"the chat template renders the turns {part} turn {turn + 1} ({chat[turn].role}) alone "
                    f"otherwise than in the chat, so that turn's tokens cannot be told; {_NO_CHOICE}"
                )
        spans.append((len(before), len(up_to)))
    return spans


def _ended(
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    spans: Sequence[Span],
    chat: Sequence[Turn],
    turns: Sequence[int],
    marked: bool,
) -> list[Span] | str:
    """The spans up to the token that ends each turn, which marks may leave out; no white space behind it."""
    control = tokenizer.added_tokens_decoder
    ended = []
    for turn, (start, end) in zip(turns, spans, strict=True):
        last = end
        while end > start and not str(tokenizer.decode([ids[end - 1]])).strip():
            end -= 1
        if marked and ids[end - 1] not in control and last < len(ids) and ids[last] in control:
            end = last + 1
        if end <= start or ids[end - 1] not in control:
            return (
                f"the chat template ends turn {turn + 1} ({chat[turn].role}) with no token of its own, so "
                "the model could not learn to end its answers; set data.chat_template to a template that does"
            )
        ended.append((start, end))
    return ended


def _left_out(tokenizer: PreTrainedTokenizerBase, chat: Sequence[Turn], trained: Sequence[int]) -> int | None:
    """The first turn that the rendering does not hold in full; assistant turns that are not trained may lack.

    A template that leaves out what earlier answers thought shows a server's model the same.
    """
    text = str(tokenizer.apply_chat_template(messages(chat), tokenize=False))
    needed = [i for i, turn in enumerate(chat) if turn.role != "assistant" or i in trained]
    times = Counter(chat[i].content for i in needed)
    return next((i for i in needed if text.count(chat[i].content) < times[chat[i].content]), None)


def _says_left_out(chat: Sequence[Turn], index: int) -> str:
    role = chat[index].role
    advice = "; or set data.loss_on: last, which trains no earlier answer" if role == "assistant" else ""
    return (
        f"the chat template leaves out turn {index + 1} ({role}) or a part of it, so what is trained would "
        f"not be what the data says; set data.chat_template to a template that keeps it{advice}"
    )
