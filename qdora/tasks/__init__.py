"""Sources: where examples come from, as a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from qdora.config import DatasetConfig, SourceName
from qdora.data.rows import BadRows, Dataset
from qdora.errors import InputError
from qdora.tasks.base import Selection, assemble
from qdora.tasks.columns import select_file, select_hub
from qdora.tasks.commonsense import select_commonsense
from qdora.tasks.gsm8k import select_gsm8k
from qdora.tasks.orca_math import select_orca_math
from qdora.tasks.synthetic import load_synthetic

Select = Callable[[DatasetConfig], Selection]

ROW_SOURCES: Mapping[SourceName, Select] = {
    "orca_math": select_orca_math,
    "commonsense": select_commonsense,
    "gsm8k": select_gsm8k,
    "file": select_file,
    "hub": select_hub,
}


def load_dataset(config: DatasetConfig, bad_rows: BadRows) -> Dataset:
    """The examples of one split of a source, in the order in which they are used.

    Args:
        config: source, split, seed, limit.
        bad_rows: `stop` raises at a row that cannot be used, `skip` leaves it out and lists it.
    Raises:
        InputError: a file, folder or hub dataset is missing or unreadable; the held-out part is as
            large as the data; no usable row is left.
        DataError: a row cannot be used, and `bad_rows` is `stop`; names file and line.
    """
    if config.source == "synthetic":
        return load_synthetic(config)
    dataset = assemble(ROW_SOURCES[config.source](config), config.limit, bad_rows)
    if not dataset.examples:
        where = f"source {config.source!r}" + (f" at {config.path}" if config.path else "")
        reason = f"{len(dataset.skipped)} bad rows, the first: " if dataset.skipped else "it has no rows"
        first = f"{dataset.skipped[0].origin}: {dataset.skipped[0].reason}" if dataset.skipped else ""
        raise InputError(f"{where}, split {config.split!r}: no usable row; {reason}{first}")
    return dataset
