"""Prompt templates: the text around a question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Shot = tuple[str, str]
"""A question and its completion, shown before the question that is asked."""


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """A declared template."""

    text: str | None
    """The prompt, with {question}; None: the tokenizer's own chat template.  A space at its end belongs to
    what follows: tokenizers join it to the first word."""
    provenance: str
    next_question: str | None = None
    """How the model begins another question, after which nothing is part of its answer."""

    @property
    def joins(self) -> bool:
        """Whether prompt and completion are one text to the tokenizer."""
        return self.text is not None and self.text.endswith(" ")

    def render(self, question: str, shots: Sequence[Shot]) -> str:
        """The prompt of a template with text: the shots, each followed by a blank line, and the question."""
        assert self.text is not None
        # replace, not format: a question may hold braces, and format would read a template's own.
        before = (self.text.replace("{question}", asked) + answered for asked, answered in shots)
        return "\n\n".join([*before, self.text.replace("{question}", question)])


PROMPTS: Mapping[str, PromptTemplate] = {
    "question_answer": PromptTemplate(
        "###Question:\n{question}\n###Answer:\n",
        "The published Orca-Math runs, fsdp_qlora train.py and experiments/orca_math/evaluate.ipynb.",
        next_question="\n###Question:",
    ),
    "alpaca": PromptTemplate(
        "Below is an instruction that describes a task. Write a response that appropriately completes "
        "the request.\n\n### Instruction:\n{question}\n\n### Response:\n",
        "Stanford Alpaca's wording, which LLM-Adapters uses.  LLM-Adapters' code indents every line by 16 "
        "spaces and trains, but does not evaluate, with a stray code comment in the first line; neither is "
        "repeated here.",
        next_question="\nBelow is an instruction",
    ),
    "cloze": PromptTemplate(
        "Question: {question}\nAnswer: ",
        "lm-evaluation-harness' prompt of ARC, lm_eval/tasks/arc/arc_easy.yaml.",
        next_question="\nQuestion:",
    ),
    "chat": PromptTemplate(
        None, "The tokenizer's chat template: one user turn and the header of the assistant's."
    ),
}
