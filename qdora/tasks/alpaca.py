"""The cleaned Alpaca data: instructions, some with an input, and free-form answers.

The paper has GPT-4 score answers to MT-Bench (Table 5), which is not done here: `first_line` compares the
first line of an answer with that of the reference, which few good answers meet.  Losses can be compared.

Source: arXiv:2402.09353 §5.4; github.com/gururise/AlpacaDataCleaned, on the hub `yahma/alpaca-cleaned`.
"""

from __future__ import annotations

from qdora.config import DatasetConfig
from qdora.data.rows import Example, Row, text_of
from qdora.tasks.base import HeldOutTask, instruction_of

DATASET = "yahma/alpaca-cleaned"
HELD_OUT = 1_000


class Alpaca(HeldOutTask):
    """Cleaned Alpaca from the hub or a local copy."""

    dataset = DATASET
    columns = ("instruction", "input", "output")
    rows_held_out = HELD_OUT

    def example(self, config: DatasetConfig, row: Row) -> Example:
        """The instruction, an input under Alpaca's heading, and the output, which is the answer too."""
        question, output = instruction_of(row), text_of(row, "output")
        return Example(question, output, output, self.name, row.origin)


ALPACA = Alpaca(
    "alpaca",
    provenance=f"{DATASET}, of Stanford Alpaca; arXiv:2402.09353 §5.4",
    # The two disagree; the repository is where the data is made.
    licence="CC BY-NC 4.0 (its repository); CC BY 4.0 (its page on the hub)",
    kind="text",
)
