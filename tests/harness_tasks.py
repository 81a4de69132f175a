"""Tasks of lm-evaluation-harness over local files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from qdora.data.rows import Example

CHOICES = [
    Example(
        f"Is {i} {'odd' if i % 2 else 'even'} or {'x' * (i % 5)}?", text, text, "ARC-Easy", f"a:{i}", options
    )
    for i, (text, options) in enumerate(
        [
            ("two", ("one", "two", "three dogs")),
            ("it is", ("it is not", "it is")),
            ("a b c", ("a", "a b", "a b c", "d")),
            ("no", ("yes", "no")),
            ("7", ("6", "7", "88")),
            ("red", ("blue sky", "red")),
            ("fish", ("fish", "bird", "cat", "dog")),
        ]
    )
]


def write_task(folder: Path, name: str, rows: Sequence[dict[str, Any]], **settings: Any) -> Path:
    """A task of the harness over a local file."""
    folder.mkdir(exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "metadata": {"version": 2.0},
        **settings,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    return folder


def write_choices(folder: Path, examples: Sequence[Example], name: str = "choices") -> Path:
    rows = [
        {"question": e.question, "options": list(e.options), "gold": e.options.index(e.answer)}
        for e in examples
    ]
    metrics = [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")]
    return write_task(
        folder,
        name,
        rows,
        output_type="multiple_choice",
        doc_to_text="Question: {{question}}\nAnswer:",
        doc_to_choice="{{options}}",
        doc_to_target="{{gold}}",
        metric_list=metrics,
    )
