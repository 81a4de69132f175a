"""Prompt templates, and examples as token ids, for training and evaluation."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar, cast

from jinja2 import TemplateError

from qdora.data.rows import BadRows, Example, Skipped, raise_for_skipped
from qdora.errors import InputError, suggest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """A declared template."""

    text: str | None
    """The prompt, with {question}; None: the tokenizer's own chat template."""
    provenance: str


PROMPTS: Mapping[str, PromptTemplate] = {
    "question_answer": PromptTemplate(
        "###Question:\n{question}\n###Answer:\n",
        "The published Orca-Math runs, fsdp_qlora train.py and experiments/orca_math/evaluate.ipynb.",
    ),
    "alpaca": PromptTemplate(
        "Below is an instruction that describes a task. Write a response that appropriately completes "
        "the request.\n\n### Instruction:\n{question}\n\n### Response:\n",
        "Stanford Alpaca's wording, which LLM-Adapters uses.  LLM-Adapters' code indents every line by 16 "
        "spaces and trains, but does not evaluate, with a stray code comment in the first line; neither is "
        "repeated here.",
    ),
    "chat": PromptTemplate(
        None, "The tokenizer's chat template: one user turn and the header of the assistant's."
    ),
}


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase,
    template_name: str,
    questions: Sequence[str],
    *,
    parse_special_tokens: bool = False,
) -> list[list[int]]:
    """For each question the ids after which the model writes its answer.

    Args:
        parse_special_tokens: whether the text of a special token in a question is that token.
    Raises: InputError: unknown template, `chat` with a tokenizer that has no usable one, or the text of a
        special token that the tokenizer cannot read as ordinary text.
    """
    template = PROMPTS.get(template_name)
    if template is None:
        raise InputError(f"prompt template {template_name!r}; {suggest(template_name, PROMPTS)}")
    if not questions:
        return []
    if template.text is None:
        return _chat_ids(tokenizer, questions, parse_special_tokens)
    marked = _marked(tokenizer, questions, parse_special_tokens)
    own = special_tokens(tokenizer).search(template.text)
    if own and any(marked):
        raise InputError(f"prompt {template_name!r}: {_cannot_be_text(own.group())}, as the template has it")
    # replace, not format: a question may hold braces, and format would read a template's own.
    texts = [template.text.replace("{question}", question) for question in questions]
    encoded = _encode(tokenizer, texts, marked, add_special_tokens=True)
    # Some tokenizers are set to close every text with EOS; after that there is nothing to answer.
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
    tokenizer: PreTrainedTokenizerBase, questions: Sequence[str], parse_special_tokens: bool
) -> list[list[int]]:
    if not tokenizer.chat_template:
        others = ", ".join(name for name, template in PROMPTS.items() if template.text is not None)
        raise InputError(f"prompt 'chat': this tokenizer has no chat template; use one of: {others}")

    def encode(questions: list[str], as_text: bool) -> list[list[int]]:
        encoded = tokenizer.apply_chat_template(
            [[{"role": "user", "content": question}] for question in questions],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
            sanitize_control_tokens=as_text,
            tokenizer_kwargs={"split_special_tokens": False},
        )
        return cast("list[list[int]]", encoded)

    # Beside special tokens a template may write other added ones, such as Gemma's <start_of_turn>.
    marked = _marked(tokenizer, questions, parse_special_tokens, added=True)
    try:
        return _by_mark(questions, marked, encode)
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
    will see, whatever the tokenizer would merge across their boundary.

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
    for chunk, prompts in _chunks(examples, tokenizer, prompt, parse_special_tokens):
        completions = _completion_ids(tokenizer, chunk, parse_special_tokens)
        for example, before, after in zip(chunk, prompts, completions, strict=True):
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
    for chunk, prompts in _chunks(examples, tokenizer, prompt, parse_special_tokens):
        for example, ids in zip(chunk, prompts, strict=True):
            if len(ids) < max_length:
                kept.append(example)
            else:
                reason = f"the prompt alone has {len(ids)} tokens, data.max_length is {max_length}"
                skipped.append(Skipped(example.origin, reason))
    raise_for_skipped(skipped, bad_rows)
    return kept, skipped


def _chunks(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, prompt: str, parse_special_tokens: bool
) -> Iterator[tuple[Sequence[Example], list[list[int]]]]:
    """Chunks of the examples, with the ids of their prompts."""
    for start in range(0, len(examples), _CHUNK):
        chunk = examples[start : start + _CHUNK]
        questions = [example.question for example in chunk]
        yield chunk, prompt_ids(tokenizer, prompt, questions, parse_special_tokens=parse_special_tokens)


def _completion_ids(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], parse_special_tokens: bool
) -> list[list[int]]:
    texts = [example.completion for example in examples]
    marked = _marked(tokenizer, texts, parse_special_tokens)
    return _encode(tokenizer, texts, marked, add_special_tokens=False)


# Tokens that model families reserve for padding, or for nothing; the first one found is used.
_RESERVED = (
    "<|finetune_right_pad_id|>",
    "<pad>",
    "[PAD]",
    "<|pad|>",
    "<|padding|>",
    "<|pad_token|>",
    "<|reserved_special_token_0|>",
    "<|reserved_0|>",
    "<reserved_0>",
    "<unused0>",
)
_RESERVED_PATTERN = re.compile(r"[<\[]\|?[\w-]*(pad|reserved|unused)[\w-]*\|?[>\]]", re.IGNORECASE)


def choose_pad_token(tokenizer: PreTrainedTokenizerBase, rows: int | None = None) -> int:
    """Set `tokenizer.pad_token` and return its id; the vocabulary never grows.

    Where padding is EOS, masking labels by the pad id would leave EOS untrained, and the model would
    never learn to end.  In order: the tokenizer's own pad token, its unknown token, a token
    reserved for padding or for nothing, each only if it is not EOS; else EOS.

    Args:
        rows: of the model's embedding, where it is known; a token beyond them is not chosen.
    Raises: InputError: the tokenizer has no EOS token, or it is beyond the rows.
    """
    eos = eos_id(tokenizer)
    if rows is not None and eos >= rows:
        raise InputError(
            f"the tokenizer {tokenizer.name_or_path!r} ends texts with {tokenizer.eos_token!r}, whose id "
            f"{eos} is beyond the {rows} rows of the model's embedding; set eos_token to one that it has"
        )

    def usable(token_id: int | None) -> bool:
        return token_id is not None and token_id != eos and (rows is None or token_id < rows)

    if usable(tokenizer.pad_token_id):
        return int(tokenizer.pad_token_id)
    if usable(tokenizer.unk_token_id):
        tokenizer.pad_token = tokenizer.unk_token
    else:
        tokenizer.pad_token = _reserved_token(tokenizer, usable) or tokenizer.eos_token
    return int(tokenizer.pad_token_id)


def eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that ends a completion.

    Raises: InputError: the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__!r} has no EOS token, so a "
            "model could not learn to end its answer; set eos_token in its tokenizer_config.json"
        )
    return int(tokenizer.eos_token_id)


def _reserved_token(tokenizer: PreTrainedTokenizerBase, usable: Callable[[int | None], bool]) -> str | None:
    vocabulary = tokenizer.get_vocab()
    added = sorted(tokenizer.get_added_vocab())
    candidates = [*_RESERVED, *(token for token in added if _RESERVED_PATTERN.fullmatch(token))]
    return next((token for token in candidates if usable(vocabulary.get(token))), None)
