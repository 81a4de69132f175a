"""Data sets, and how an example becomes tokens."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

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
    completion: str = "answer"
    """The text that is trained on."""
    answer: str | None = None
    """The gold answer; where not given it is extracted from the completion."""
    turns: str | None = None
    """`messages`, `conversations`: the list of turns, where its column is not called so."""


class DatasetConfig(Section):
    """Where examples come from; `qdora.tasks` checks the source and which keys it takes."""

    source: str
    """Name of a task, of a mixture of tasks, `file` or `hub`."""
    path: str | None = None
    """File or folder; `hub`: dataset id; `orca_math`, `gsm8k`, `alpaca`: a local copy instead of the hub."""
    name: str | None = None
    """`hub`: configuration of the dataset; `file`: name under which scores are reported."""
    split: str = "train"
    """`train` or `test`; `hub`: any split name."""
    tasks: tuple[str, ...] = ()
    """`commonsense`: the tasks, mixed in this order; all eight where empty."""
    format: FormatName | None = None
    """`file` and `hub`: how a row holds a chat or a question; recognized from the columns where not given."""
    columns: ColumnsConfig = ColumnsConfig()
    """`file` and `hub`: the columns."""
    answer_kind: AnswerKind = "numeric"
    """`file` and `hub`: how answers are compared."""
    answers: AnswersName = "label"
    """Commonsense tasks: `label` as published; `text`: the bare question, answered by an option's text."""
    count: Count | None = None
    """`synthetic`: how many problems to generate."""
    held_out: Annotated[int, Field(ge=0, le=MOST)] = 0
    """`file`, `hub`, `orca_math`, `alpaca`: rows at the end of the shuffled set, the split `test`."""
    seed: Annotated[int, Field(ge=0)] = 42
    """Seed of the shuffle, of the generator and of mixing."""
    limit: Count | None = None
    """Use only so many examples, the first ones after shuffling."""


class DataConfig(Section):
    """Training and test data, and how an example becomes tokens."""

    train: DatasetConfig
    test: DatasetConfig | None = None
    """Scored by `evaluate`; null: nothing is, and no questions are kept out of training."""
    validation: Count | None = None
    """Left out of training: the last so many training examples, before `train.limit`, no test questions."""
    prompt: PromptName = "question_answer"
    """Template, the same in training and in evaluation; chats are rendered with `chat`."""
    chat_template: str | None = None
    """`llama3`, `chatml`, `plain` or a Jinja file, in place of the tokenizer's own chat template."""
    loss_on: LossOn = "assistant"
    """What is trained: all assistant turns of a chat, its last one, or `all`, the prompt too."""
    max_length: Annotated[int, Field(ge=8, le=MOST)] = 512
    """Longest example in tokens, prompt and completion together."""
    parse_special_tokens: bool = False
    """Read the text of a special token in a question or completion, such as `</s>`, as that token."""
    packing: PackingName = "none"
    """`batch`: a micro-batch's sequences joined without padding; `stream`: rows filled to `max_length`."""
    bad_rows: Literal["stop", "skip"] = "stop"
    """An unusable or too long row stops the run, or is skipped and counted."""

    @model_validator(mode="after")
    def _one_split(self) -> DataConfig:
        train, test = self.train, self.test
        if test is None:
            return self
        same_rows = train.held_out and (train.source, train.path) == (test.source, test.path)
        if same_rows and (train.held_out, train.seed) != (test.held_out, test.seed):
            raise ValueError(
                f"train holds out {train.held_out} rows with seed {train.seed}, test takes "
                f"{test.held_out} with seed {test.seed} of the same data; they must agree"
            )
        return self
