"""Orca-Math, split as in the published QDoRA runs.

Shuffled with seed 42, the last 5,000 rows are held out; the published scores are taken on the
first 500 of those (`limit: 500`).

Source: Orca-Math, arXiv:2402.14830; fsdp_qlora, experiments/orca_math/evaluate.ipynb.
"""

from __future__ import annotations

from qdora.config import DatasetConfig
from qdora.data.rows import Example, Row, text_of
from qdora.tasks.base import HeldOutTask
from qdora.tasks.scoring import gold_answer, published_gold

DATASET = "microsoft/orca-math-word-problems-200k"
HELD_OUT = 5_000


class OrcaMath(HeldOutTask):
    """Orca-Math from the hub or a local copy, with the published split."""

    dataset = DATASET
    columns = ("question", "answer")
    rows_held_out = HELD_OUT

    def example(self, config: DatasetConfig, row: Row) -> Example:
        """The solution and the number that it states, spelled as the published rule cuts it out if it can.

        Some solutions end in a word.  They stay, with an empty gold answer: leaving them out would shift
        the published 500.
        """
        question, solution = text_of(row, "question"), text_of(row, "answer")
        answer = published_gold(gold_answer(solution) or "", solution)
        return Example(question, solution, answer, self.name, row.origin)


ORCA_MATH = OrcaMath("orca_math", provenance=f"{DATASET}, arXiv:2402.14830", licence="MIT", gold="solution")
