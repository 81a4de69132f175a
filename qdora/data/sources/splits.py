"""Which rows form a split, by index, so that a bad row never moves another one to the other side."""

from __future__ import annotations

import numpy as np

from qdora.errors import InputError


def shuffled(count: int, seed: int) -> list[int]:
    """The order into which `datasets.Dataset.shuffle(seed)` brings `count` rows."""
    return [int(i) for i in np.random.default_rng(seed).permutation(count)]


def file_order_for_test(count: int, split: str, seed: int) -> list[int]:
    """Published train and test files: train is shuffled, test keeps its order."""
    return shuffled(count, seed) if split == "train" else list(range(count))


def held_out_split(count: int, split: str, held_out: int, seed: int, where: str) -> list[int]:
    """The shuffled rows; with `held_out`, `test` is the last so many of them and `train` the others.

    Args:
        where: names the data in errors.
    Raises: InputError: `held_out` is not smaller than the number of rows, or the split is neither
        `train` nor `test`.
    """
    order = shuffled(count, seed)
    if held_out == 0:
        return order
    if held_out >= count:
        raise InputError(f"{where}: held_out {held_out} leaves nothing to train on; there are {count} rows")
    if split not in ("train", "test"):
        raise InputError(f"{where}: split {split!r} with held_out {held_out}; allowed: train, test")
    return order[-held_out:] if split == "test" else order[:-held_out]
