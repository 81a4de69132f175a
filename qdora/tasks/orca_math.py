"""Orca-Math, split as in the published QDoRA runs.

Shuffled with seed 42, the last 5,000 rows are held out; the published scores are taken on the
first 500 of those (`limit: 500`).

Source: Orca-Math, arXiv:2402.14830; fsdp_qlora, experiments/orca_math/evaluate.ipynb.
"""

from __future__ import annotations

from pathlib import Path

from qdora.config import DatasetConfig
from qdora.data.readers import read_hub, read_rows
from qdora.data.rows import Example, Row, text_of
from qdora.tasks.base import Selection, candidates, held_out_split
from qdora.tasks.gold import last_number_or_ratio

DATASET = "microsoft/orca-math-word-problems-200k"
HELD_OUT = 5_000


def select_orca_math(config: DatasetConfig) -> Selection:
    """The hub's rows, or those of a local copy; `held_out` replaces the published 5,000 where given.

    Raises: InputError: the data cannot be read, or has no more rows than are held out.
    """
    if config.path is None:
        rows = read_hub(DATASET, None, "train", ["question", "answer"])
    else:
        rows = read_rows(Path(config.path))
    where = config.path or DATASET
    order = held_out_split(len(rows), config.split, config.held_out or HELD_OUT, config.seed, where)
    return Selection(candidates(rows, _example), order)


def _example(row: Row) -> Example:
    question, completion = text_of(row, "question"), text_of(row, "answer")
    # Some solutions end in a word.  They stay, with an empty gold answer: leaving them out would
    # shift the published 500.
    return Example(question, completion, last_number_or_ratio(completion) or "", "orca_math", row.origin)
