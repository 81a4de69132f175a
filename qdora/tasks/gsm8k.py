"""GSM8K: questions with step-by-step solutions that end in `#### N`.

Source: arXiv:2110.14168; files train.jsonl and test.jsonl, on the hub `openai/gsm8k`.
"""

from __future__ import annotations

import re
from pathlib import Path

from qdora.config import DatasetConfig
from qdora.data.readers import read_hub, read_rows, require
from qdora.data.rows import BadRowError, Example, Row, text_of
from qdora.tasks.base import Selection, candidates, file_order_for_test
from qdora.tasks.gold import number_after_hashes

DATASET = "openai/gsm8k"
_CALCULATOR = re.compile(r"<<[^<>]*>>")


def select_gsm8k(config: DatasetConfig) -> Selection:
    """The hub's rows, those of SPLIT.jsonl in a folder, or those of a file, which is then the split.

    Raises: InputError: the data cannot be read.
    """
    if config.path is None:
        rows = read_hub(DATASET, "main", config.split, ["question", "answer"])
    else:
        rows = read_rows(_split_file(Path(config.path), config.split))
    return Selection(candidates(rows, _example), file_order_for_test(len(rows), config.split, config.seed))


def _split_file(path: Path, split: str) -> Path:
    require(path, "a GSM8K file, or a folder with train.jsonl and test.jsonl")
    if not path.is_dir():
        return path
    file = path / f"{split}.jsonl"
    require(file, f"the GSM8K {split} set")
    return file


def _example(row: Row) -> Example:
    question, solution = text_of(row, "question"), text_of(row, "answer")
    answer = number_after_hashes(solution)
    if answer is None:
        raise BadRowError("column 'answer' has no '#### N' with the gold answer")
    # The annotations were written for a calculator that the model does not have.
    completion = _CALCULATOR.sub("", solution)
    return Example(question, completion, answer, "gsm8k", row.origin)
