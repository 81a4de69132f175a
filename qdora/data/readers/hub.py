"""Datasets of the Hugging Face hub, each row named by its index."""

from __future__ import annotations

from collections.abc import Sequence

from qdora.data.rows import Row
from qdora.errors import InputError, suggest


def read_hub(dataset_id: str, name: str | None, split: str, columns: Sequence[str]) -> list[Row]:
    """The rows of one split, in the hub's order.

    Args:
        dataset_id: for example `openai/gsm8k`.
        name: configuration of the dataset, where it has several.
        split: the hub's split name.
        columns: the columns that must be there.
    Raises: InputError: the hub cannot be reached, the dataset, configuration, split or a column
        does not exist, or access is not granted.
    """
    import datasets

    where = f"{dataset_id}{f' ({name})' if name else ''}, split {split!r}"
    try:
        table = datasets.load_dataset(dataset_id, name, split=split)
    # The library and its transport raise errors without a common base; none of them is our bug.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"hub dataset {where}: cannot be loaded: {reason}. Check the id, the configuration and the "
            "split, that this machine reaches the hub, and for a gated dataset that you are logged in; "
            "a downloaded copy can be read with a local path instead"
        ) from error
    for column in columns:
        if column not in table.column_names:
            raise InputError(
                f"hub dataset {where}: no column {column!r}; {suggest(column, table.column_names)}"
            )
    return [Row(f"{dataset_id}[{i}]", values) for i, values in enumerate(table)]
