"""Data sets, and how an example becomes tokens."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from qdora.config.section import MOST, Count, Section

PackingName = Literal["none", "batch", "stream"]
PromptName = Literal["question_answer", "alpaca", "cloze", "chat"]
AnswerKind = Literal["numeric", "choice", "text"]
AnswersName = Literal["label", "text"]
FormatName = Literal["question_answer", "messages", "conversations", "alpaca", "prompt_completion"]
LossOn = Literal["assistant", "last", "all"]


class ColumnsConfig(Section):
    """Which column of a file or hub dataset plays which part."""

    question: str = "question"
    """The column with the question. Where it is called `instruction`, a column `input` is put below it."""
    completion: str = "answer"
    """The text that is trained on."""
    answer: str | None = None
    """The gold answer; where not given it is extracted from the completion."""
    turns: str | None = None
    """`messages`, `conversations`: the list of turns, where its column is not called so."""


class DatasetConfig(Section):
    """Where examples come from; `qdora.tasks` checks the source and which keys it takes."""

    source: str
    """The task that rows come from, `commonsense` or `arithmetic` for a mixture of tasks, `file` or `hub`;
    docs/data-formats.md describes each."""
    path: str | None = None
    """`file`: file or folder; `hub`: dataset id; `orca_math`, `gsm8k`, `alpaca`: a local copy instead of the
    hub; `commonsense`, `arithmetic`: folder; their tasks: that folder, or a file.
    Required but for `orca_math`, `gsm8k` and `alpaca`; `synthetic` has none."""
    name: str | None = None
    """`hub`: configuration of the dataset; `file`: name under which scores are reported."""
    split: str = "train"
    """`train` or `test`; `hub`: any split name."""
    tasks: tuple[str, ...] = ()
    """`commonsense` and `arithmetic`: the tasks to mix; all where empty."""
    format: FormatName | None = None
    """`file` and `hub`: how a row holds a chat or a question; recognized from the columns where not given
    (see Chats)."""
    columns: ColumnsConfig = ColumnsConfig()
    """`file` and `hub`: the columns."""
    answer_kind: AnswerKind = "numeric"
    """`file` and `hub`: how answers are compared. Also how the gold answer is cut out of the completion where
    `columns.answer` is not given."""
    answers: AnswersName = "label"
    """`commonsense` and its tasks: `label`, as published, lists the options in the question and answers by
    label; `text` asks the bare question and answers by the option's text (docs/data-formats.md). `data.train`
    and `data.test` must agree."""
    count: Count | None = None
    """`synthetic`: how many problems to generate; required there."""
    held_out: Annotated[int, Field(ge=0, le=MOST)] = 0
    """`file`, `hub`: rows at the end of the shuffled set that form the split `test`. `orca_math`: replaces
    the published 5,000 where not 0; `alpaca`: 1,000. Use the same number, `path` and `seed` in `data.train`
    and `data.test`."""
    seed: Annotated[int, Field(ge=0)] = 42
    """Seed of the shuffle, of the generator and of mixing."""
    streaming: bool = False
    """`hub`, in `data.train`: read rows as training goes on, instead of downloading all of them first
    (docs/data-formats.md). Needs `training.max_steps`."""
    shuffle_buffer: Count = 10_000
    """With `streaming`: so many examples are held, of which the next one is drawn."""
    limit: Count | None = None
    """Use only so many usable examples, the first ones in the order of use. The test set of a
    mixture takes them from its tasks in turn."""

    @model_validator(mode="after")
    def _buffers_a_stream(self) -> DatasetConfig:
        usual = type(self).model_fields["shuffle_buffer"].default
        if not self.streaming and self.shuffle_buffer != usual:
            raise ValueError(
                f"shuffle_buffer {self.shuffle_buffer} is of a stream; set streaming: true, or leave it out"
            )
        return self


def _kind_of_validation(value: object) -> str:
    """Which of the forms of `data.validation` is meant, so that an error speaks of that one."""
    if isinstance(value, dict | DatasetConfig):
        return VALIDATION_KINDS[2]
    return VALIDATION_KINDS[1] if isinstance(value, float) else VALIDATION_KINDS[0]


VALIDATION_KINDS = ("<number>", "<fraction>", "<source>")
Fraction = Annotated[float, Field(gt=0, lt=1)]
ValidationSize = Annotated[
    Annotated[Count, Tag(VALIDATION_KINDS[0])]
    | Annotated[Fraction, Tag(VALIDATION_KINDS[1])]
    | Annotated[DatasetConfig, Tag(VALIDATION_KINDS[2])],
    Discriminator(_kind_of_validation),
]


class DataConfig(Section):
    """Training and test data, and how an example becomes tokens."""

    train: DatasetConfig
    """Training set."""
    test: DatasetConfig | None = None
    """Test set. Its questions are removed from the training set. Without one a run trains, and `evaluate`
    needs a file by `--data`, or `--split validation`."""
    validation: ValidationSize | None = None
    """Examples to be scored that are not trained on, without test questions. A number or a fraction: so many
    of the training examples, the last ones that the source has, whatever `train.limit` says
    (docs/experiments.md). A mapping, as `train` is: a source of their own, whose questions are removed from
    the training set."""
    prompt: PromptName = "question_answer"
    """Template, the same in training and in evaluation; docs/data-formats.md has the texts. Rows that are
    chats (see Chats) are rendered with `chat` by themselves; `alpaca` and `cloze` are refused for them."""
    chat_template: str | None = None
    """`llama3`, `chatml`, `plain`, or a Jinja file: the template of `chat`, in place of the tokenizer's own
    (see Chats)."""
    loss_on: LossOn = "assistant"
    """What is trained. `assistant`: the assistant turns of a chat, the completion of a question. `last`: of a
    chat its last assistant turn alone. `all`: the prompt too, of every task; published commonsense runs call
    that `train_on_inputs` or `train_on_prompt`."""
    max_length: Annotated[int, Field(ge=8, le=MOST)] = 512
    """Longest example in tokens: prompt, completion and EOS together. Nothing is cut. It may not exceed the
    model's context."""
    parse_special_tokens: bool = False
    """Read the text of a special token in a question or completion, such as `</s>`, as that token; else it is
    ordinary text. The template's own special tokens are always tokens."""
    packing: PackingName = "none"
    """`none`: an example is a row of a micro-batch, padded; `batch`: its examples are joined without
    padding; `stream`: rows are filled to `max_length` (docs/configuration.md)."""
    bad_rows: Literal["stop", "skip"] = "stop"
    """An unusable or too long row stops the run, or is skipped and counted."""

    @model_validator(mode="after")
    def _streams_what_can_be(self) -> DataConfig:
        for name, other in (("test", self.test), ("validation", self.validation)):
            if isinstance(other, DatasetConfig) and other.streaming:
                raise ValueError(f"{name}.streaming: only train is streamed; leave it out")
        train = self.train
        if not train.streaming:
            return self
        # Each of them needs to know all rows before the first one is used.
        if isinstance(self.validation, int | float):
            raise ValueError(
                f"validation {self.validation} is the end of all rows, and with train.streaming that is not "
                "known; allowed there: a source of its own, and null"
            )
        for key, value in (("held_out", train.held_out), ("limit", train.limit)):
            if value:
                raise ValueError(f"train.{key} {value} does not go with train.streaming; leave it out")
        if self.packing == "stream":
            raise ValueError(
                "packing 'stream' fills rows with examples of all lengths, which are not known with "
                "train.streaming; allowed there: none, batch"
            )
        return self

    @model_validator(mode="after")
    def _one_split(self) -> DataConfig:
        train = self.train
        for name, other in (("test", self.test), ("validation", self.validation)):
            if not isinstance(other, DatasetConfig):
                continue
            same_rows = train.held_out and (train.source, train.path) == (other.source, other.path)
            if same_rows and (train.held_out, train.seed) != (other.held_out, other.seed):
                raise ValueError(
                    f"train holds out {train.held_out} rows with seed {train.seed}, {name} takes "
                    f"{other.held_out} with seed {other.seed} of the same data; they must agree"
                )
        return self
