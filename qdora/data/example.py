"""What every source gives: examples, the rows it could not use, and a fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Example:
    """One question with the text to train on and the gold answer."""

    question: str
    """What goes into the prompt."""
    completion: str
    """What is trained on, without EOS."""
    answer: str
    """Gold answer."""
    task: str
    """Names the scoring rule and the report: `synthetic`, `gsm8k`, `boolq`, a file's name."""
    origin: str
    """`file:line` or `dataset[index]`; named in errors."""


@dataclass(frozen=True, slots=True)
class Skipped:
    """A row that was left out."""

    origin: str
    reason: str


@dataclass(frozen=True, slots=True)
class Dataset:
    """What a source gives."""

    examples: list[Example]
    skipped: list[Skipped]
    fingerprint: str
    """sha256 over the examples' contents, see `fingerprint`."""


def fingerprint(examples: Iterable[Example]) -> str:
    """sha256 over what the examples say and their order; where they came from does not count."""
    digest = hashlib.sha256()
    for example in examples:
        contents = [example.question, example.completion, example.answer, example.task]
        # JSON keeps the fields apart: ("ab", "c") and ("a", "bc") must differ.
        digest.update(json.dumps(contents).encode() + b"\n")
    return digest.hexdigest()
