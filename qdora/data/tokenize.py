"""Prompts, and examples as token ids, for training and evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar, cast

from jinja2 import TemplateError

from qdora.config import LossOn
from qdora.data.chats import Span, messages, render_chats, require_chat_template
from qdora.data.encode import by_mark, cannot_be_text, encode_texts, marked_texts, special_tokens
from qdora.data.padding import eos_id
from qdora.data.rows import BadRows, Example, Skipped, Turn, raise_for_skipped
from qdora.data.templates import PROMPTS, PromptTemplate, Shot
from qdora.errors import InputError, suggest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

Message = dict[str, str]
"""A turn of a chat: its `role` (`system`, `user`, `assistant`) and its `content`."""

Asked = str | tuple[Turn, ...]
"""A question, or the turns of a chat before its last answer."""


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase,
    template_name: str,
    questions: Sequence[Asked],
    *,
    parse_special_tokens: bool = False,
    shots: Sequence[Shot] = (),
) -> list[list[int]]:
    """For each question the ids after which the model writes its answer.

    Args:
        questions: turns of a chat go with `chat` only.
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
    asked = _texts(questions, template_name)
    texts = [template.render(question, shots).rstrip(" ") for question in asked]
    shown = "\n".join(map("\n".join, shots))
    marked = marked_texts(tokenizer, [f"{question}\n{shown}" for question in asked], parse_special_tokens)
    return _encode_unclosed(tokenizer, template_name, texts, marked)


def continued_ids(
    tokenizer: PreTrainedTokenizerBase,
    template_name: str,
    questions: Sequence[Asked],
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
        asked = _texts(questions, template_name)
        found = _joined_ids(tokenizer, template_name, asked, continuations, parse_special_tokens, shots)
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
        (mark,) = marked_texts(tokenizer, ["\n".join([question, shown, *possible])], parse_special_tokens)
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


def _texts(questions: Sequence[Asked], template_name: str) -> list[str]:
    texts = [question for question in questions if isinstance(question, str)]
    if len(texts) < len(questions):
        raise InputError(f"prompt {template_name!r} has room for one question; chats go with: chat")
    return texts


def _encode_unclosed(
    tokenizer: PreTrainedTokenizerBase, template_name: str, texts: Sequence[str], marked: Sequence[bool]
) -> list[list[int]]:
    """The ids of texts that begin with a template's; some tokenizers would close each with EOS."""
    own = special_tokens(tokenizer).search(PROMPTS[template_name].text or "")
    if own and any(marked):
        raise InputError(f"prompt {template_name!r}: {cannot_be_text(own.group())}, as the template has it")
    encoded = encode_texts(tokenizer, texts, marked, add_special_tokens=True)
    return [ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids for ids in encoded]


def _chat_ids(
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Asked],
    parse_special_tokens: bool,
    shots: Sequence[Shot],
) -> list[list[int]]:
    turns = [
        {"role": role, "content": text}
        for shot in shots
        for role, text in zip(("user", "assistant"), shot, strict=True)
    ]
    chats = [
        [*turns, *messages([Turn("user", question)] if isinstance(question, str) else question)]
        for question in questions
    ]
    return chat_prompt_ids(tokenizer, chats, parse_special_tokens=parse_special_tokens)


def chat_prompt_ids(
    tokenizer: PreTrainedTokenizerBase, chats: Sequence[Sequence[Message]], *, parse_special_tokens: bool
) -> list[list[int]]:
    """For each chat, by the tokenizer's own template, the ids after which the model writes its next turn.

    Args:
        parse_special_tokens: whether the text of a special token in a turn is that token.
    Raises: InputError: as `prompt_ids` for `chat`; the template refuses the roles of the turns.
    """
    require_chat_template(
        tokenizer, [name for name, template in PROMPTS.items() if template.text is not None]
    )

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
    marked = marked_texts(tokenizer, texts, parse_special_tokens, added=True)
    try:
        return by_mark(chats, marked, encode)
    except TemplateError as error:
        raise InputError(f"prompt 'chat': the tokenizer's chat template fails: {error}") from error
    except ValueError as error:  # a token that cannot be text
        raise InputError(f"prompt 'chat': {error}; see data.parse_special_tokens") from error


_CHUNK = 1_000
"""Examples handed to the tokenizer at once: enough for its threads, little memory."""


@dataclass(frozen=True, slots=True)
class TokenizedExample:
    """Ids of prompt, completion and EOS, or of a chat; what is behind the prompt and in no gap is trained."""

    input_ids: list[int]
    prompt_length: int
    origin: str
    gaps: tuple[Span, ...] = ()
    """Spans behind the prompt that carry no loss: what others than the assistant say. In order, apart."""

    @property
    def labels(self) -> int:
        """How many tokens are trained."""
        return len(self.input_ids) - self.prompt_length - sum(end - start for start, end in self.gaps)


def tokenize_examples(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_length: int,
    bad_rows: BadRows,
    *,
    parse_special_tokens: bool = False,
    loss_on: LossOn = "assistant",
) -> tuple[list[TokenizedExample], list[Skipped]]:
    """Tokenize for training.

    Prompt and completion are tokenized separately, so that training sees the prompt ids that generation
    will see, whatever the tokenizer would merge across their boundary.  A template that ends in a space
    `joins` them: the completion's ids are those that follow the prompt's in the joined text.  A chat is
    rendered by the tokenizer's chat template, whatever the prompt.

    Args:
        prompt: name of the template.
        max_length: of prompt, completion and EOS, or of a chat, in all; nothing is truncated.
        bad_rows: what to do with an example that is longer, has no tokens, or cannot be rendered.
        parse_special_tokens: as for `prompt_ids`; holds for completions too.
        loss_on: `all` trains the prompt too; `last` of a chat the last assistant turn alone.
    Raises:
        InputError: no EOS token, or as `prompt_ids`.
        DataError: a bad row, and `bad_rows` is `stop`.
    """
    kept: list[TokenizedExample] = []
    skipped: list[Skipped] = []
    for start in range(0, len(examples), _CHUNK):
        chunk = examples[start : start + _CHUNK]
        all_found = tokenize_chunk(chunk, tokenizer, prompt, max_length, parse_special_tokens, loss_on)
        for example, found in zip(chunk, all_found, strict=True):
            if isinstance(found, str):
                skipped.append(Skipped(example.origin, found))
            else:
                kept.append(found)
    raise_for_skipped(skipped, bad_rows)
    return kept, skipped


def tokenize_chunk(
    chunk: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_length: int,
    parse_special_tokens: bool,
    loss_on: LossOn,
) -> Iterator[TokenizedExample | str]:
    """Each example with its tokens, or why it has none; arguments and errors are those of
    `tokenize_examples`."""
    chats, texts = [e for e in chunk if e.turns], [e for e in chunk if not e.turns]
    of_chats = _tokenize_chats(chats, tokenizer, max_length, parse_special_tokens, loss_on)
    of_texts = _tokenize_texts(texts, tokenizer, prompt, max_length, parse_special_tokens, loss_on)
    for example in chunk:
        yield next(of_chats if example.turns else of_texts)


def _tokenize_texts(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_length: int,
    parse_special_tokens: bool,
    loss_on: LossOn,
) -> Iterator[TokenizedExample | str]:
    """Questions and answers with their tokens, or the reason of one that cannot be used."""
    eos = eos_id(tokenizer)
    pairs = _training_ids(tokenizer, prompt, examples, parse_special_tokens)
    for example, (before, after) in zip(examples, pairs, strict=True):
        ids = [*before, *after, eos]
        if not before or not after:
            yield f"no tokens: the prompt has {len(before)}, the completion {len(after)}"
        elif len(ids) > max_length:
            yield (
                f"{len(ids)} tokens (prompt {len(before)}, completion {len(after)}, EOS 1), "
                f"longer than data.max_length {max_length}"
            )
        else:  # nothing comes before the first token
            yield TokenizedExample(ids, 1 if loss_on == "all" else len(before), example.origin)


def _tokenize_chats(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    parse_special_tokens: bool,
    loss_on: LossOn,
) -> Iterator[TokenizedExample | str]:
    """Chats with their tokens, or the reason of one that cannot be used."""
    if not examples:
        return
    # Beside special tokens a template may write other added ones, such as Gemma's <start_of_turn>.
    texts = ["\n".join(example.texts) for example in examples]
    as_text = marked_texts(tokenizer, texts, parse_special_tokens, added=True)
    rendered = render_chats(tokenizer, [example.turns for example in examples], as_text, loss_on)
    for example, chat in zip(examples, rendered, strict=True):
        if isinstance(chat, str):
            yield chat
        elif len(chat.ids) > max_length:
            yield f"{len(chat.ids)} tokens, longer than data.max_length {max_length}"
        else:
            starts = [start for start, _ in chat.spans]
            between = zip((end for _, end in chat.spans), [*starts[1:], len(chat.ids)], strict=True)
            gaps = tuple((end, start) for end, start in between if end < start)
            yield TokenizedExample(chat.ids, starts[0], example.origin, gaps)


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
        asked = [example.asked for example in chunk]
        prompts = prompt_ids(tokenizer, prompt, asked, parse_special_tokens=parse_special_tokens)
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
    marked = marked_texts(tokenizer, texts, parse_special_tokens)
    return encode_texts(tokenizer, texts, marked, add_special_tokens=False)
