"""Chat templates by name or file, for tokenizers that have none or another one."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from qdora.data.chats import RenderedChat, render_chats
from qdora.data.readers import read_text, require
from qdora.data.rows import Turn
from qdora.errors import InputError
from qdora.files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAMED = ("llama3", "chatml", "plain")
"""Each is a file in `jinja/`; all have generation marks."""

TEMPLATE_FILE = "chat_template.jinja"
"""Where a saved tokenizer has its template."""

_TOKEN = re.compile(r"<\|\w+\|>")
_PROBE = (Turn("user", "a"), Turn("assistant", "b"))


def use_chat_template(tokenizer: PreTrainedTokenizerBase, choice: str) -> str:
    """Give a tokenizer a chat template; the token that ends a turn becomes its EOS token.

    Args:
        choice: a name of `NAMED`, or a Jinja file.
    Returns: a sentence on what has changed.
    Raises: InputError: no such name or file; the tokenizer lacks a token of the template, or no token ends a
        turn. Then the tokenizer is as it was.
    """
    text = template_text(choice)
    if choice in NAMED:
        _require_tokens(tokenizer, choice, text)
    before = tokenizer.chat_template
    tokenizer.chat_template = text
    try:
        ended = end_with_turns(tokenizer)
    except InputError as error:
        tokenizer.chat_template = before
        raise InputError(f"data.chat_template {choice!r}: {error}") from None
    replaced = " in place of the tokenizer's own" if before else ""
    return f"chat template {choice!r}{replaced}; {ended or f'answers end with {tokenizer.eos_token!r}'}"


def end_with_turns(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Make the token that ends an answer in the chat template the EOS token, at which generation stops.

    Returns: a sentence on it; None where it is the EOS token already.
    Raises: InputError: the template cannot render a question and its answer.
    """
    (probed,) = render_chats(tokenizer, [_PROBE], [False], "last")
    if not isinstance(probed, RenderedChat):
        raise InputError(f"a question and its answer cannot be rendered: {probed}")
    end = tokenizer.convert_ids_to_tokens(probed.ids[probed.spans[-1][1] - 1])
    if end == tokenizer.eos_token:
        return None
    former, tokenizer.eos_token = tokenizer.eos_token, end
    return f"answers end with {end!r}, which is the EOS token now in place of {former!r}"


def use_saved_template(tokenizer: PreTrainedTokenizerBase, folder: Path) -> bool:
    """Give a tokenizer the chat template and the EOS token of one that was saved; whether there was one.

    Raises: InputError: its files cannot be read.
    """
    if not (folder / TEMPLATE_FILE).is_file():
        return False
    tokenizer.chat_template = read_text(folder / TEMPLATE_FILE)
    settings = folder / "tokenizer_config.json"
    eos = read_json(settings).get("eos_token") if settings.is_file() else None
    eos = eos.get("content") if isinstance(eos, dict) else eos
    if isinstance(eos, str) and eos in tokenizer.get_vocab():
        tokenizer.eos_token = eos
    return True


def template_text(choice: str) -> str:
    """The text of a template of `NAMED`, or of a file.

    Raises: InputError: there is none.
    """
    if choice in NAMED:
        return files("qdora.data").joinpath("jinja", f"{choice}.jinja").read_text("utf-8")
    try:
        require(Path(choice), "a Jinja file")
    except InputError as error:
        raise InputError(f"data.chat_template: {error}; allowed: {', '.join(NAMED)}, or a file") from None
    return read_text(Path(choice))


def _require_tokens(tokenizer: PreTrainedTokenizerBase, choice: str, text: str) -> None:
    """Each token that a named template writes is one of the tokenizer's.

    Raises: InputError: some are not; the names that would go are given.
    """
    lacking = _lacking(tokenizer, text)
    if not lacking:
        return
    others = [name for name in NAMED if not _lacking(tokenizer, template_text(name))]
    raise InputError(
        f"data.chat_template {choice!r} writes {', '.join(lacking)}, which this tokenizer has not as tokens: "
        "the text of each would become several, and the model could not end a turn with one. It has all "
        f"tokens of {', '.join(others)}; or name a Jinja file that ends turns with one that it has, such as "
        f"{tokenizer.eos_token!r}"
    )


def _lacking(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    has = {token.content for token in tokenizer.added_tokens_decoder.values()}
    return [token for token in dict.fromkeys(_TOKEN.findall(text)) if token not in has]
