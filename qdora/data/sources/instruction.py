"""The instruction format of Alpaca and LLM-Adapters: an instruction, and sometimes an input to it."""

from __future__ import annotations

from qdora.data.rows import Row, optional_text_of, text_of


def question_of(row: Row, column: str) -> str:
    """The question; an instruction's input follows it on a new line.

    Raises: BadRowError: the question is missing or empty, or the input is not text.
    """
    question = text_of(row, column)
    extra = optional_text_of(row, "input") if column == "instruction" else ""
    return f"{question}\n{extra}" if extra else question
