"""From a data configuration to tokenized training data and test examples; a tokenizer is enough, no model."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from qdora.config import DataConfig, DatasetConfig, PromptName, RunConfig
from qdora.data.chats import require_chat_template
from qdora.data.padding import choose_pad_token
from qdora.data.rows import Dataset, Example, Skipped, question_key
from qdora.data.stream import ExampleStream
from qdora.data.table import (
    fingerprint_of,
    first_chat,
    repeated_questions,
    without_origins,
    without_questions,
)
from qdora.data.token_table import lengths_of, special_texts, tokenize_set
from qdora.data.tokenize import TokenizedExample, fitting_prompts
from qdora.errors import InputError, MissingDataError, MissingPathError
from qdora.tasks import check_data, find_task, load_dataset, task_for
from qdora.tasks.base import NeedsGold

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Split = Literal["test", "validation"]
"""The examples that a model is scored on."""


@dataclass(frozen=True, slots=True)
class PreparedData:
    """Everything a run takes from its data."""

    train: Sequence[TokenizedExample]
    test: list[Example]
    """Empty where `data.test` is null."""
    validation: list[Example]
    """Empty where `data.validation` is null."""
    pad_id: int
    leaked: int
    """Training examples removed because their question is a test question."""
    leaked_validation: int
    """Training examples removed because their question is a validation question."""
    leaked_of_validation: int | None
    """Validation examples removed because their question is a test question; None where they are training
    examples, of which that is known."""
    skipped: list[Skipped]
    """Bad rows left out, of all sets."""
    repeated_questions: int
    """Training examples whose question is that of one before them."""
    special_text: list[str]
    """Examples with the text of a special token: origin and token."""
    fingerprints: dict[str, str]
    """`train`, `test` and `validation` where there are any: sha256 over the examples that are really used."""
    prompt: PromptName
    """By which they are rendered: that of the configuration, but `chat` for chats."""
    keeps_template: bool
    """Whether a chat template is trained that belongs to the adapter: that of chats, or one by name."""
    stream: ExampleStream | None = None
    """What is trained on with `data.train.streaming`; `train` and the numbers are of its first rows."""

    def left_out_of_stream(self) -> dict[str, str]:
        """What the stream has left out so far, as a row of a table; nothing without a stream."""
        if self.stream is None:
            return {}
        left_out = f"{self.stream.leaked} for their question, {self.stream.skipped} that cannot be used"
        return {"rows left out": f"{left_out} (first pass)"}

    def longest(self, config: DataConfig) -> int:
        """Most tokens of an example that may come."""
        return config.max_length if self.stream is not None else max(lengths_of(self.train))

    def counts(self) -> dict[str, Any]:
        """Fingerprints, numbers of examples and of those that were left out, as a manifest has them."""
        counts = {
            "fingerprints": self.fingerprints,
            "train": len(self.train) if self.stream is None else None,
            "test": len(self.test),
            "leaked_questions_removed": self.leaked,
            "rows_skipped": len(self.skipped),
        }
        if self.stream is not None:
            counts["streamed"] = True
        if self.validation:
            counts["validation"] = len(self.validation)
            counts["leaked_validation_questions_removed"] = self.leaked_validation
            if self.leaked_of_validation is not None:
                counts["test_questions_removed_from_validation"] = self.leaked_of_validation
        return counts


@dataclass(frozen=True, slots=True)
class TrainingSets:
    """The training set without test questions, and the validation examples set apart from it."""

    train: Sequence[Example]
    validation: list[Example]
    loaded: int
    """Training examples before any was removed."""
    leaked: int
    leaked_validation: int
    skipped: list[Skipped]
    leaked_of_validation: int | None = None
    """Of a validation set with a source of its own: examples whose question is a test question."""


def prepare(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, context_length: int | None
) -> PreparedData:
    """Load all sets, remove leaked questions from the training set, tokenize it.

    Args:
        tokenizer: gets a pad token if it has none of its own.
        context_length: the model's, in tokens; None where it is not known.
    Raises:
        InputError: as `check_data`; `max_length` exceeds the context; data missing or unreadable; no
            training, validation or test examples are left; the tokenizer has no EOS token or no chat
            template.
        DataError: a bad row, and `bad_rows` is `stop`; names file and line.
    """
    check_data(config)
    if context_length is not None and config.max_length > context_length:
        raise InputError(
            f"data.max_length {config.max_length} is longer than the model's context "
            f"of {context_length} tokens"
        )
    pad_id = choose_pad_token(tokenizer)
    test = Dataset([], []) if config.test is None else load_test(config, tokenizer)
    sets = load_training(config, test.examples)
    own_prompt = config.prompt
    config = for_rows(config, sets.train, test.examples, sets.validation)
    if config.prompt != own_prompt and config.test is not None:
        test = load_test(config, tokenizer)
    if config.prompt == "chat":
        require_chat_template(tokenizer)
    elif config.chat_template is not None:
        raise InputError(
            "data.chat_template renders chats and the prompt chat, but the rows are no chats and "
            f"data.prompt is {config.prompt!r}: set data.prompt: chat, or leave data.chat_template out"
        )
    validation = Dataset([], [])
    if sets.validation:
        validation = _fitting(Dataset(sets.validation, []), config, tokenizer, "validation")
    tokenized = tokenize_set(sets.train, tokenizer, config)
    train, too_long = tokenized.examples, tokenized.skipped
    if not train:
        first = f" or not rendered; the first: {too_long[0]}" if too_long else ""
        raise InputError(
            f"the training set is empty: {sets.loaded} examples loaded, {sets.leaked} of them are test "
            f"questions, {sets.leaked_validation} validation questions, {len(too_long)} longer than "
            f"data.max_length {config.max_length}{first}"
        )
    scored = [*validation.examples, *test.examples]
    sets_used = {"train": tokenized.used, "test": test.examples, "validation": validation.examples}
    fingerprints = {name: fingerprint_of(examples) for name, examples in sets_used.items() if examples}
    stream = None
    if config.train.streaming:
        stream = _stream(config, tokenizer, [*sets.validation, *test.examples])
        parts = config.train.model_dump_json(include={"path", "name", "split", "seed", "shuffle_buffer"})
        fingerprints["train"] = hashlib.sha256((fingerprints["train"] + parts).encode()).hexdigest()
    return PreparedData(
        stream=stream,
        train=train,
        test=list(test.examples),
        validation=list(validation.examples),
        pad_id=pad_id,
        leaked=sets.leaked,
        leaked_validation=sets.leaked_validation,
        leaked_of_validation=sets.leaked_of_validation,
        skipped=[*sets.skipped, *too_long, *test.skipped, *validation.skipped],
        repeated_questions=repeated_questions(tokenized.used),
        special_text=[
            *tokenized.special_text,
            *special_texts(((e.origin, e.question) for e in scored), tokenizer),
        ],
        fingerprints=fingerprints,
        prompt=config.prompt,
        keeps_template=config.chat_template is not None or first_chat(tokenized.used) is not None,
    )


def _stream(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, scored: Sequence[Example]
) -> ExampleStream:
    gold: NeedsGold = "none" if config.test is None else "questions"
    read = replace(find_task(config.train), needs_gold=gold).stream(config.train)
    excluded = {question_key(example.question) for example in scored}
    # A copy: its EOS token may become another one, and tokens are to be those of rows in memory.
    return ExampleStream(read, copy.deepcopy(tokenizer), config, excluded)


def for_rows(config: DataConfig, *sets: Sequence[Example]) -> DataConfig:
    """The configuration with the prompt by which its sets are rendered: `chat` where some are chats.

    Raises: InputError: the configured prompt has room for one question only.
    """
    chat = next(filter(None, map(first_chat, sets)), None)
    if chat is None or config.prompt == "chat":
        return config
    if config.prompt != DataConfig.model_fields["prompt"].default:
        raise InputError(
            f"data.prompt {config.prompt!r} has room for one question, and {chat.origin} is a chat, which "
            "the chat template renders: set data.prompt: chat, or leave it out"
        )
    return config.model_copy(update={"prompt": "chat"})


def rendered(config: RunConfig, data: PreparedData) -> RunConfig:
    """A run's configuration with the prompt by which its data are rendered."""
    if config.data.prompt == data.prompt:
        return config
    return config.model_copy(update={"data": config.data.model_copy(update={"prompt": data.prompt})})


def _load(config: DataConfig, source: DatasetConfig, needs_gold: NeedsGold) -> Dataset:
    """`load_dataset` of one of the sets.

    Raises: MissingDataError: its file or folder is not there. InputError, DataError: as `load_dataset`.
    """
    try:
        return load_dataset(source, config.bad_rows, needs_gold=needs_gold)
    except MissingPathError as error:
        sets = {"train": config.train, "test": config.test, "validation": config.validation}
        named = (name for name, s in sets.items() if isinstance(s, DatasetConfig) and s.path == source.path)
        raise MissingDataError(str(error), [f"data.{name}.path" for name in named]) from None


def load_training(config: DataConfig, test: Sequence[Example]) -> TrainingSets:
    """Load the training set, remove the test questions, set the validation examples apart.

    Where the validation examples are training examples, they are the last ones of all that the source has,
    whatever `train.limit` is: training sets of several sizes leave out the same ones. An example with the
    question of one of them is removed from training as one with a test question is.

    Raises:
        InputError: data missing or unreadable, or `data.validation` leaves nothing to train on, or nothing to
            validate on.
        DataError: a bad row, and `bad_rows` is `stop`; names file and line.
    """
    size = config.validation
    # Without a test set a question may be answered by any text.
    gold: NeedsGold = "none" if config.test is None else "questions"
    if size is None or isinstance(size, DatasetConfig):
        loaded = _load(config, config.train, gold)
        clean, leaked = remove_leaked(loaded.examples, test)
        sets = TrainingSets(clean, [], len(loaded.examples), leaked, 0, loaded.skipped)
        return sets if size is None else _with_own_validation(sets, size, config, gold, test)
    unlimited = config.train.model_copy(update={"limit": None})
    loaded = _load(config, unlimited, gold)
    everything, _ = remove_leaked(loaded.examples, test)
    if isinstance(size, float):
        size = max(1, round(size * len(everything)))
    if size >= len(everything):
        raise InputError(
            f"data.validation {config.validation} leaves nothing to train on: there are {len(everything)} "
            f"training examples whose question is no test question"
        )
    validation = list(everything[-size:])
    limited = loaded.examples[: config.train.limit]
    clean, leaked = remove_leaked(limited, test)
    apart = {example.origin for example in validation}
    rest = without_origins(clean, apart)
    train, leaked_validation = remove_leaked(rest, validation)
    return TrainingSets(train, validation, len(limited), leaked, leaked_validation, loaded.skipped)


def _with_own_validation(
    sets: TrainingSets, source: DatasetConfig, config: DataConfig, gold: NeedsGold, test: Sequence[Example]
) -> TrainingSets:
    """With the validation examples of a source of their own, whose questions are removed from training."""
    loaded = _load(config, source, gold)
    clean, of_validation = remove_leaked(loaded.examples, test)
    validation = list(clean)
    if not validation:
        raise InputError(
            f"the validation set is empty: the questions of all {of_validation} examples of data.validation "
            "are test questions"
        )
    train, leaked = remove_leaked(sets.train, validation)
    return replace(
        sets,
        train=train,
        validation=validation,
        leaked_validation=leaked,
        skipped=[*sets.skipped, *loaded.skipped],
        leaked_of_validation=of_validation,
    )


def load_test(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """The test set as `prepare` gives it, for evaluation alone.

    Raises:
        InputError: no test set, data missing or unreadable, or no prompt fits into `max_length`.
        DataError: a bad row, and `bad_rows` is `stop`; names file and line.
    """
    if config.test is None:
        raise InputError(
            "there is no test set: data.test is not set. Name one, data.test: {source: file, path: FILE}, or "
            "a file with --data"
        )
    loaded = _load(config, config.test, "all")
    loaded = replace(loaded, examples=list(loaded.examples))
    return _fitting(loaded, config, tokenizer, "test")


def load_split(config: DataConfig, tokenizer: PreTrainedTokenizerBase, split: Split) -> Dataset:
    """The test or the validation set as `prepare` gives it, for evaluation alone.

    Raises:
        InputError: as `load_test` and `load_training`; `data.validation` is null.
        DataError: a bad row, and `bad_rows` is `stop`; names file and line.
    """
    if split == "test":
        return load_test(config, tokenizer)
    if config.validation is None:
        raise InputError("there is no validation set: data.validation is null; allowed: the split test")
    test = [] if config.test is None else load_test(config, tokenizer).examples
    validation = load_training(config, test).validation
    require_gold(validation, "validation")
    return _fitting(Dataset(validation, []), config, tokenizer, split)


def require_gold(examples: Iterable[Example], split: Split) -> None:
    """Check that examples can be scored by comparing answers.

    Raises: InputError: one of the user's own data has no gold answer.
    """
    for example in examples:
        if not example.answer and not task_for(example.task).names_examples:
            raise InputError(
                f"{example.origin}: the {split} set has no gold answer to compare an answer with; name its "
                "column in columns.answer, or set answer_kind: text, which takes all of it. A loss needs none"
            )


def _fitting(
    loaded: Dataset, config: DataConfig, tokenizer: PreTrainedTokenizerBase, split: Split
) -> Dataset:
    """The examples of a split whose prompt fits.

    Raises: InputError, DataError: as `load_test`.
    """
    config = for_rows(config, loaded.examples)
    kept, too_long = fitting_prompts(
        loaded.examples,
        tokenizer,
        config.prompt,
        config.max_length,
        config.bad_rows,
        parse_special_tokens=config.parse_special_tokens,
    )
    if not kept:
        fit = f"no prompt fits into data.max_length {config.max_length}"
        raise InputError(f"the {split} set is empty: {fit}")
    return Dataset(kept, [*loaded.skipped, *too_long])


def remove_leaked(train: Sequence[Example], test: Iterable[Example]) -> tuple[Sequence[Example], int]:
    """The training examples whose question is not a test question, and how many were removed.

    The full questions are compared (for the commonsense tasks: the instruction with its answer choices)
    after `normalize`.  That catches copies which differ in case, spacing, punctuation or
    Unicode form.  It does not catch a paraphrase, other numbers or names in the same story, the
    same question with other or reordered choices, or a test question inside a longer text.  A
    training question that stands there several times is removed, and counted, each time. A chat is removed
    for any question that a user asks in it.
    """
    kept = without_questions(train, {question_key(example.question) for example in test})
    return kept, len(train) - len(kept)
