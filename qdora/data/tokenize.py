"""Prompts, and examples as token ids, for training and evaluation."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar, cast

from jinja2 import TemplateError

from qdora.data.padding import eos_id
from qdora.data.rows import BadRows, Example, Skipped, raise_for_skipped
from qdora.data.templates import PROMPTS, PromptTemplate, Shot
from qdora.errors import InputError, suggest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

Message = dict[str, str]
"""A turn of a chat: its `role` (`system`, `user`, `assistant`) and its `content`."""


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase,
    template_name: str,
    questions: Sequence[str],
    *,
    parse_special_tokens: bool = False,
    shots: Sequence[Shot] = (),
) -> list[list[int]]:
    """For each question the ids after which the model writes its answer.

    Args:
        parse_special_tokens: whether the text of a special token in a question is that token.
        shots: answered questions that stand before each; for `chat` as turns.
    Raises: InputError: unknown template, `chat` with a tokenizer that has no usable one, or the text of a
        special token that the tokenizer cannot read as ordinary text.
    """
    template = _template(template_name)
    if not questions:
        return []
    if template.text is None:
        return _chat_ids(tokenizer, questions, parse_special_tokens, shots)
    texts = [template.render(question, shots).rstrip(" ") for question in questions]
    shown = "\n".join(map("\n".join, shots))
    marked = _marked(tokenizer, [f"{question}\n{shown}" for question in questions], parse_special_tokens)
    return _encode_unclosed(tokenizer, template_name, texts, marked)


def continued_ids(
    tokenizer: PreTrainedTokenizerBase,
    template_name: str,
    questions: Sequence[str],
    continuations: Sequence[Sequence[str]],
    *,
    parse_special_tokens: bool = False,
    shots: Sequence[Shot] = (),
) -> list[tuple[list[int], list[list[int]]]]:
    """For each question the ids of its prompt, and those of each text that may follow it.

    As lm-evaluation-harness has it: white space at the end of the prompt goes to the continuations, and a
    continuation's ids are those of prompt and continuation together behind as many as the prompt has alone.
    A chat template's prompt stays as it is, and continuations are encoded apart.

    Args:
        continuations: for each question; special tokens in them are read as in questions.
    Raises: InputError: as `prompt_ids`; a continuation has no tokens.
    Source: EleutherAI/lm-evaluation-harness, lm_eval/api/model.py `TemplateLM._encode_pair`.
    """
    template = _template(template_name)
    if template.text is None:
        special = parse_special_tokens
        prompts = prompt_ids(tokenizer, template_name, questions, parse_special_tokens=special, shots=shots)
        found = [
            (prompt, _encode_completions(tokenizer, texts, special))
            for prompt, texts in zip(prompts, continuations, strict=True)
        ]
    else:
        found = _joined_ids(tokenizer, template_name, questions, continuations, parse_special_tokens, shots)
    for (_, behind), possible in zip(found, continuations, strict=True):
        for text, ids in zip(possible, behind, strict=True):
            if not ids:
                raise InputError(f"{text!r} has no tokens behind its prompt, so it has no likelihood")
    return found


def _joined_ids(
    tokenizer: PreTrainedTokenizerBase,
    template_name: str,
    questions: Sequence[str],
    continuations: Sequence[Sequence[str]],
    parse_special_tokens: bool,
    shots: Sequence[Shot],
) -> list[tuple[list[int], list[list[int]]]]:
    template = _template(template_name)
    shown = "\n".join(map("\n".join, shots))
    texts: list[str] = []
    marked: list[bool] = []
    firsts: list[int] = []
    for question, possible in zip(questions, continuations, strict=True):
        prompt = template.render(question, shots)
        of_question = [prompt.rstrip(), *(prompt + text for text in possible)]
        # Text of a special token in one of them: all are read alike, or their beginnings would differ.
        (mark,) = _marked(tokenizer, ["\n".join([question, shown, *possible])], parse_special_tokens)
        firsts.append(len(texts))
        texts += of_question
        marked += [mark] * len(of_question)
    encoded = _encode_unclosed(tokenizer, template_name, texts, marked)
    found = []
    for first, possible in zip(firsts, continuations, strict=True):
        prompt_length = len(encoded[first])
        wholes = encoded[first + 1 : first + 1 + len(possible)]
        found.append((encoded[first], [ids[prompt_length:] for ids in wholes]))
    return found


def _template(name: str) -> PromptTemplate:
    template = PROMPTS.get(name)
    if template is None:
        raise InputError(f"prompt template {name!r}; {suggest(name, PROMPTS)}")
    return template


def _encode_unclosed(
    tokenizer: PreTrainedTokenizerBase, template_name: str, texts: Sequence[str], marked: Sequence[bool]
) -> list[list[int]]:
    """The ids of texts that begin with a template's; some tokenizers would close each with EOS."""
    own = special_tokens(tokenizer).search(PROMPTS[template_name].text or "")
    if own and any(marked):
        raise InputError(f"prompt {template_name!r}: {_cannot_be_text(own.group())}, as the template has it")
    encoded = _encode(tokenizer, texts, marked, add_special_tokens=True)
    return [ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids for ids in encoded]


def special_tokens(tokenizer: PreTrainedTokenizerBase, *, added: bool = False) -> re.Pattern[str]:
    """Finds the texts of a tokenizer's special tokens, longer ones first; with `added`, of all added ones."""
    tokens = tokenizer.added_tokens_decoder.values()
    texts = {token.content for token in tokens if token.special or added}
    longest_first = sorted((text for text in texts if text.strip()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _marked(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], parse_special_tokens: bool, added: bool = False
) -> list[bool]:
    """Which texts hold the text of a special token that is to stay text; all others are encoded as ever."""
    tokens = special_tokens(tokenizer, added=added)
    return [not parse_special_tokens and tokens.search(text) is not None for text in texts]


def _encode(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    marked: Sequence[bool],
    *,
    add_special_tokens: bool,
) -> list[list[int]]:
    """The ids of texts; in the marked ones special tokens are text.

    Raises: InputError: as `prompt_ids`.
    """

    def encode(texts: list[str], as_text: bool, added: bool = add_special_tokens) -> list[list[int]]:
        encoding = tokenizer(
            texts, add_special_tokens=added, split_special_tokens=as_text, padding=False, truncation=False
        )
        return cast("list[list[int]]", encoding["input_ids"])

    held = [text for text, mark in zip(texts, marked, strict=True) if mark]
    # Without the tokens that the tokenizer adds: only what comes of the text is looked at.
    for text, ids in zip(held, encode(held, True, False) if held else [], strict=True):
        for token in special_tokens(tokenizer).findall(text):
            if token != tokenizer.unk_token and tokenizer.convert_tokens_to_ids(token) in ids:
                raise InputError(_cannot_be_text(token))
    return _by_mark(texts, marked, encode)


def _by_mark(
    items: Sequence[T], marked: Sequence[bool], encode: Callable[[list[T], bool], list[list[int]]]
) -> list[list[int]]:
    """The ids of all items, of which the marked ones are encoded apart."""
    encoded: list[list[int]] = [[] for _ in items]
    for mark in {*marked}:
        chosen = [i for i, each in enumerate(marked) if each == mark]
        for i, ids in zip(chosen, encode([items[i] for i in chosen], mark), strict=True):
            encoded[i] = ids
    return encoded


def _cannot_be_text(token: str) -> str:
    return (
        f"this tokenizer makes a special token of {token!r} even where it is ordinary text; remove it from "
        "the data, or set data.parse_special_tokens: true where the token is meant"
    )


def _chat_ids(
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    parse_special_tokens: bool,
    shots: Sequence[Shot],
) -> list[list[int]]:
    turns = [
        {"role": role, "content": text}
        for shot in shots
        for role, text in zip(("user", "assistant"), shot, strict=True)
    ]
    chats = [[*turns, {"role": "user", "content": question}] for question in questions]
    return chat_prompt_ids(tokenizer, chats, parse_special_tokens=parse_special_tokens)


def chat_prompt_ids(
    tokenizer: PreTrainedTokenizerBase, chats: Sequence[Sequence[Message]], *, parse_special_tokens: bool
) -> list[list[int]]:
    """For each chat, by the tokenizer's own template, the ids after which the model writes its next turn.

    Args:
        parse_special_tokens: whether the text of a special token in a turn is that token.
    Raises: InputError: as `prompt_ids` for `chat`; the template refuses the roles of the turns.
    """
    if not tokenizer.chat_template:
        others = ", ".join(name for name, template in PROMPTS.items() if template.text is not None)
        raise InputError(f"prompt 'chat': this tokenizer has no chat template; use one of: {others}")

    def encode(chats: list[Sequence[Message]], as_text: bool) -> list[list[int]]:
        encoded = tokenizer.apply_chat_template(
            [list(chat) for chat in chats],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
            sanitize_control_tokens=as_text,
            tokenizer_kwargs={"split_special_tokens": False},
        )
        return cast("list[list[int]]", encoded)

    # Beside special tokens a template may write other added ones, such as Gemma's <start_of_turn>.
    texts = ["\n".join(turn["content"] for turn in chat) for chat in chats]
    marked = _marked(tokenizer, texts, parse_special_tokens, added=True)
    try:
        return _by_mark(chats, marked, encode)
    except TemplateError as error:
        raise InputError(f"prompt 'chat': the tokenizer's chat template fails: {error}") from error
    except ValueError as error:  # a token that cannot be text
        raise InputError(f"prompt 'chat': {error}; see data.parse_special_tokens") from error


_CHUNK = 1_000
"""Examples handed to the tokenizer at once: enough for its threads, little memory."""


@dataclass(frozen=True, slots=True)
class TokenizedExample:
    """Ids of prompt, completion and EOS; only those behind the prompt are trained."""

    input_ids: list[int]
    prompt_length: int
    origin: str


def tokenize_examples(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_length: int,
    bad_rows: BadRows,
    *,
    parse_special_tokens: bool = False,
) -> tuple[list[TokenizedExample], list[Skipped]]:
    """Tokenize for training.

    Prompt and completion are tokenized separately, so that training sees the prompt ids that generation
    will see, whatever the tokenizer would merge across their boundary.  A template that ends in a space
    `joins` them: the completion's ids are those that follow the prompt's in the joined text.

    Args:
        prompt: name of the template.
        max_length: of prompt, completion and EOS in all; nothing is truncated.
        bad_rows: what to do with an example that is longer, or has no tokens.
        parse_special_tokens: as for `prompt_ids`; holds for completions too.
    Raises:
        InputError: no EOS token, or as `prompt_ids`.
        DataError: a bad row, and `bad_rows` is `stop`.
    """
    eos = eos_id(tokenizer)
    kept: list[TokenizedExample] = []
    skipped: list[Skipped] = []
    for start in range(0, len(examples), _CHUNK):
        chunk = examples[start : start + _CHUNK]
        pairs = _training_ids(tokenizer, prompt, chunk, parse_special_tokens)
        for example, (before, after) in zip(chunk, pairs, strict=True):
            ids = [*before, *after, eos]
            if before and after and len(ids) <= max_length:
                kept.append(TokenizedExample(ids, len(before), example.origin))
                continue
            if not before or not after:
                reason = f"no tokens: the prompt has {len(before)}, the completion {len(after)}"
            else:
                reason = (
                    f"{len(ids)} tokens (prompt {len(before)}, completion {len(after)}, EOS 1), "
                    f"longer than data.max_length {max_length}"
                )
            skipped.append(Skipped(example.origin, reason))
    raise_for_skipped(skipped, bad_rows)
    return kept, skipped


def fitting_prompts(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_length: int,
    bad_rows: BadRows,
    *,
    parse_special_tokens: bool = False,
) -> tuple[list[Example], list[Skipped]]:
    """The examples whose prompt leaves room for at least one token of an answer.

    Raises:
        InputError: as `prompt_ids`.
        DataError: a prompt does not fit, and `bad_rows` is `stop`.
    """
    kept: list[Example] = []
    skipped: list[Skipped] = []
    for start in range(0, len(examples), _CHUNK):
        chunk = examples[start : start + _CHUNK]
        questions = [example.question for example in chunk]
        prompts = prompt_ids(tokenizer, prompt, questions, parse_special_tokens=parse_special_tokens)
        for example, ids in zip(chunk, prompts, strict=True):
            if len(ids) < max_length:
                kept.append(example)
            else:
                reason = f"the prompt alone has {len(ids)} tokens, data.max_length is {max_length}"
                skipped.append(Skipped(example.origin, reason))
    raise_for_skipped(skipped, bad_rows)
    return kept, skipped


def _training_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: str, examples: Sequence[Example], parse_special_tokens: bool
) -> list[tuple[list[int], list[int]]]:
    """The ids of each example's prompt and of its completion."""
    questions = [example.question for example in examples]
    completions = [example.completion for example in examples]
    special = parse_special_tokens
    if _template(prompt).joins:
        pairs = continued_ids(
            tokenizer, prompt, questions, [[c] for c in completions], parse_special_tokens=special
        )
        return [(before, after[0]) for before, after in pairs]
    prompts = prompt_ids(tokenizer, prompt, questions, parse_special_tokens=special)
    return list(zip(prompts, _encode_completions(tokenizer, completions, special), strict=True))


def _encode_completions(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], parse_special_tokens: bool
) -> list[list[int]]:
    marked = _marked(tokenizer, texts, parse_special_tokens)
    return _encode(tokenizer, texts, marked, add_special_tokens=False)
