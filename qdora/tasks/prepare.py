"""From a data configuration to tokenized training data and test examples; a tokenizer is enough, no model."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qdora.config import DataConfig
from qdora.data.padding import choose_pad_token
from qdora.data.rows import Dataset, Example, Skipped, fingerprint
from qdora.data.tokenize import (
    TokenizedExample,
    fitting_prompts,
    special_tokens,
    tokenize_examples,
)
from qdora.errors import InputError
from qdora.tasks import check_data, load_dataset

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class PreparedData:
    """Everything a run takes from its data."""

    train: list[TokenizedExample]
    test: list[Example]
    pad_id: int
    leaked: int
    """Training examples removed because their question is a test question."""
    skipped: list[Skipped]
    """Bad rows left out, of both sets."""
    special_text: list[str]
    """Examples with the text of a special token: origin and token."""
    fingerprints: dict[str, str]
    """`train` and `test`: sha256 over the examples that are really used."""


def prepare(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, context_length: int | None
) -> PreparedData:
    """Load both sets, remove leaked questions from the training set, tokenize it.

    Args:
        tokenizer: gets a pad token if it has none of its own.
        context_length: the model's, in tokens; None where it is not known.
    Raises:
        InputError: as `check_data`; `max_length` exceeds the context; data missing or unreadable; no
            training or test examples are left; the tokenizer has no EOS token or no chat template.
        DataError: a bad row, and `bad_rows` is `stop`; names file and line.
    """
    check_data(config)
    if context_length is not None and config.max_length > context_length:
        raise InputError(
            f"data.max_length {config.max_length} is longer than the model's context "
            f"of {context_length} tokens"
        )
    pad_id = choose_pad_token(tokenizer)
    test = load_test(config, tokenizer)
    loaded = load_dataset(config.train, config.bad_rows)
    clean, leaked = remove_leaked(loaded.examples, test.examples)
    train, too_long = tokenize_examples(
        clean,
        tokenizer,
        config.prompt,
        config.max_length,
        config.bad_rows,
        parse_special_tokens=config.parse_special_tokens,
    )
    if not train:
        raise InputError(
            f"the training set is empty: {len(loaded.examples)} examples loaded, {leaked} of them are test "
            f"questions, {len(too_long)} longer than data.max_length {config.max_length}"
        )
    left_out = {row.origin for row in too_long}
    used = [example for example in clean if example.origin not in left_out]
    return PreparedData(
        train=train,
        test=test.examples,
        pad_id=pad_id,
        leaked=leaked,
        skipped=[*loaded.skipped, *too_long, *test.skipped],
        special_text=_special_text(used, test.examples, tokenizer),
        fingerprints={"train": fingerprint(used), "test": fingerprint(test.examples)},
    )


def load_test(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """The test set as `prepare` gives it, for evaluation alone.

    Raises:
        InputError: data missing or unreadable, or no prompt fits into `max_length`.
        DataError: a bad row, and `bad_rows` is `stop`; names file and line.
    """
    loaded = load_dataset(config.test, config.bad_rows)
    kept, too_long = fitting_prompts(
        loaded.examples,
        tokenizer,
        config.prompt,
        config.max_length,
        config.bad_rows,
        parse_special_tokens=config.parse_special_tokens,
    )
    if not kept:
        raise InputError(f"the test set is empty: no prompt fits into data.max_length {config.max_length}")
    return Dataset(kept, [*loaded.skipped, *too_long])


def _special_text(
    train: Sequence[Example], test: Sequence[Example], tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    tokens = special_tokens(tokenizer)
    texts = [(example.origin, f"{example.question}\n{example.completion}") for example in train]
    texts += [(example.origin, example.question) for example in test]
    return [f"{origin} ({found.group()!r})" for origin, text in texts if (found := tokens.search(text))]


_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
# Everything but word characters and what carries meaning in a formula: operators, a sign or minus
# before a digit, a decimal point.
_PUNCTUATION = re.compile(r"(?!(?<=\d)\.\d)(?!-\s*\d)[^\w+*/=<>^%]|_")


def remove_leaked(train: Sequence[Example], test: Iterable[Example]) -> tuple[list[Example], int]:
    """The training examples whose question is not a test question, and how many were removed.

    The full questions are compared (for the commonsense tasks: the instruction with its answer choices)
    after `normalize`.  That catches copies which differ in case, spacing, punctuation or
    Unicode form.  It does not catch a paraphrase, other numbers or names in the same story, the
    same question with other or reordered choices, or a test question inside a longer text.  A
    training question that stands there several times is removed, and counted, each time.
    """
    questions = {normalize(example.question) for example in test}
    kept = [example for example in train if normalize(example.question) not in questions]
    return kept, len(train) - len(kept)


def normalize(question: str) -> str:
    """Case, Unicode form (NFKC), spacing and punctuation made alike; numbers and operators kept.

    Without the operators `5 - 3` and `5 + 3`, or `2.5` and `25`, would be the same question.
    """
    text = unicodedata.normalize("NFKC", question).casefold()
    return " ".join(_PUNCTUATION.sub(" ", _THOUSANDS.sub("", text)).split())
