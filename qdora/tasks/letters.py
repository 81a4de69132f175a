r"""Which letter A-E a text chooses: `B`, `(b)`, `**B**`, `\boxed{\text{B}}`, `Option B`, `B) 12 apples`.

The article is no choice: `the answer is A penny`.
"""

from __future__ import annotations

import re

from qdora.tasks.answers import MARKER, STATES, TO_WHAT, after_markers, before_next_question

_COMMAND = re.compile(r"\\(?:text|math|bold)[a-z]*\s*\{\s*([^{}]{0,80}?)\s*\}")
_MARKUP = re.compile(r"\\[()\[\]]")
_EMPHASIS = str.maketrans("", "", '$*_`"“”')

_NAMED = (
    r"(?i:(?:the\s+)?(?:correct\s+|right\s+|best\s+|final\s+)?(?:option|choice|answer|letter)\b\s*:?\s*)?"
)
_MARKER = re.compile(
    rf"(?=[\\acglops])(?:{MARKER.pattern}|\b(?:option|choice|letter)\b{TO_WHAT}{STATES}"
    r"|\b(?:choose|chose|choosing|picks?|picked|selects?|selected|go(?:es)? with)\b"
    r"|\bans(?:wer)?\b[.\s]*[-:]?\s*(?=[(\[]?[A-E][)\]]?[.]?\s*$))",
    re.IGNORECASE | re.MULTILINE,
)
# A bare A before a word is the article, but not before one that follows no article.
_NO_NOUN = r"(?:because|since|as|is|which|so|for|with|and|but|or)\b"
_LETTER = re.compile(
    rf"{_NAMED}(?:[(\[{{]\s*([A-Ea-e])\s*[)\]}}]|([a-e])\)|([B-E])(?!\w|['’]|-\w)"
    rf"|(A)(?!\w|['’]|-\w|\s+(?!{_NO_NOUN})[a-z]))"
)
_ANOTHER = re.compile(r"\s*(?:/|&|\bor\b|\band\b)\s*(?:[Oo]ption\s+)?[(\[]?[A-E](?!\w)")
_CALLED_CORRECT = re.compile(
    r"(?<![\w'’])[(\[]?([A-E])[)\]]?\s+is\s+(?:the\s+)?(?:correct|right|best|true|answer)\b"
)
_LONE = re.compile(rf"#*\s*{_NAMED}[(\[{{]?([A-Ea-e])[)\]}}.:]*")
# "A:" comes before a solution.
_LABEL = re.compile(r"(?:^|(?<=\s))[(\[]?(?:([A-E])[)\]]|([A-E])\.(?=\s)|([B-E]):)", re.MULTILINE)
_MENTION = re.compile(r"\(([A-E])\)|\b[Oo]ption\s+([A-E])\b(?!\s+is\s+(?:not|wrong|incorrect|false)\b)")


def lone_letter(text: str) -> str | None:
    """The letter that is all of a text but its markup, or None."""
    found = _LONE.fullmatch(_bare(text).strip())
    return found[1].upper() if found else None


def marked_letter(text: str) -> str | None:
    """The letter after the last `answer is`, `correct option is`, `I choose` and the like, or None.

    A choice of two letters is none: empty text.
    """
    text = _bare(text)
    for after, _ in after_markers(text, _MARKER):
        if letter := _LETTER.match(after):
            return "" if _ANOTHER.match(after, letter.end()) else _of(letter).upper()
    return None


def chosen_letter(text: str) -> str | None:
    """The letter that a text chooses, or None.

    In this order: the marked one; the last that is called correct; the one that is all of the text or of its
    last line; the only label, `B) 12 apples`, at the start of the first or last line; the last in brackets or
    after `Option`.
    """
    text = before_next_question(text)
    if (marked := marked_letter(text)) is not None:
        return marked or None
    text = _bare(text)
    called, mentioned = (list(pattern.finditer(text)) for pattern in (_CALLED_CORRECT, _MENTION))
    if called:
        return _of(called[-1])
    lines = [line.strip() for line in text.strip().split("\n")]
    in_line = lone_letter(text) or lone_letter(lines[-1]) or _labelled(text, lines)
    return in_line or (_of(mentioned[-1]) if mentioned else None)


def _labelled(text: str, lines: list[str]) -> str | None:
    """The letter with which the first or last line begins, where no other is a label."""
    labels = list(_LABEL.finditer(text))
    begins = any(_LABEL.match(line) for line in (lines[0], lines[-1]))
    return _of(labels[0]) if begins and len(set(map(_of, labels))) == 1 else None


def _bare(text: str) -> str:
    """The text without fonts, formula signs and emphasis."""
    if "\\" in text:
        text = _MARKUP.sub("", _COMMAND.sub(r"\1", _COMMAND.sub(r"\1", text)))
    return text.translate(_EMPHASIS)


def _of(found: re.Match[str]) -> str:
    return next(group for group in found.groups() if group)
