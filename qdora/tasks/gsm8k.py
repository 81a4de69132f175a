"""GSM8K: questions with step-by-step solutions that end in `#### N`.

Source: arXiv:2110.14168; files train.jsonl and test.jsonl, on the hub `openai/gsm8k`.
"""

from __future__ import annotations

import re
from pathlib import Path

from qdora.config import DatasetConfig
from qdora.data.columnar import read_hub
from qdora.data.folders import has_splits
from qdora.data.readers import READERS, require, stream_rows
from qdora.data.rows import BadRowError, Example, Row, Rows, text_of
from qdora.tasks.base import Task
from qdora.tasks.scoring import gold_answer

DATASET = "openai/gsm8k"
_CALCULATOR = re.compile(r"<<[^<>]*>>")
_AS_PUBLISHED = "as github.com/openai/grade-school-math has them"


class Gsm8k(Task):
    """GSM8K from the hub, a folder or a file."""

    optional = ("path",)
    dataset = DATASET

    def rows(self, config: DatasetConfig) -> Rows:
        """The hub's rows, those of a local copy or of SPLIT.jsonl in a folder, or a file's, which is then the
        split."""
        if config.path is None:
            return read_hub(DATASET, "main", config.split, ["question", "answer"])
        path = Path(config.path)
        require(path, f"a GSM8K file, or a folder with train.jsonl and test.jsonl, {_AS_PUBLISHED}")
        if path.is_dir():
            if not (path / f"{config.split}.jsonl").exists() and has_splits(path, READERS):
                return stream_rows(path, config.split, "main")
            path = path / f"{config.split}.jsonl"
            require(path, f"the GSM8K {config.split} set")
        return stream_rows(path)

    def example(self, config: DatasetConfig, row: Row) -> Example:
        """The solution without its annotations for a calculator, and the number behind its ####."""
        question, solution = text_of(row, "question"), text_of(row, "answer")
        _, hashes, tail = solution.rpartition("####")
        answer = gold_answer(hashes + tail) if hashes else None
        if answer is None:
            raise BadRowError("column 'answer' has no '#### N' with the gold answer")
        return Example(question, _CALCULATOR.sub("", solution), answer, self.name, row.origin)


GSM8K = Gsm8k(
    "gsm8k", provenance="openai/grade-school-math, arXiv:2110.14168", licence="MIT", gold="solution"
)
