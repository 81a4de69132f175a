"""Processes that must act alike: the same facts at the start, and an error of one is an error of all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from qdora.errors import InputError
from qdora.parallel.processes import Processes


def refuse_disagreement(processes: Processes, facts: Mapping[str, str]) -> None:
    """Compare what the processes know about the run; every one of them must call this.

    Args:
        facts: a name in words, as it shall stand in the message ("the configuration"), to a short
            value or digest; every process gives its own.
    Raises: InputError: on every process, with each fact that differs and who has which value.
    """
    everyones = processes.gather([dict(facts)])
    names = dict.fromkeys(name for theirs in everyones for name in theirs)
    lines = []
    for name in names:
        values = [theirs.get(name, "nothing") for theirs in everyones]
        if len(set(values)) > 1:
            lines.append(f"{name}: {_who_has_what(values)}")
    if lines:
        raise InputError(
            "the processes of this run were started with different input, nothing was done. "
            f"{'. '.join(lines)}. Allowed: the same configuration, files and package versions everywhere"
        )


@contextmanager
def together(processes: Processes) -> Iterator[None]:
    """Run a block on every process; an exception on one of them ends it on all.

    Reading files, say: a bad disk under one process must not leave the others waiting for it. The
    processes meet at the end of the block, so inside it nothing may wait for another process.

    Raises: Exception: what the block raised here.
        InputError: the block went well here and failed elsewhere; the message says where and why.
    """
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    errors = processes.gather([None if own is None else _in_words(own)])
    if own is not None:
        raise own
    failed = [f"rank {rank}: {words}" for rank, words in enumerate(errors) if words is not None]
    if failed:
        raise InputError("; ".join(failed))


def _in_words(error: Exception) -> str:
    # A sentence of ours stands for itself; of anything else the kind is half of the message.
    return str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"


def _who_has_what(values: Sequence[str]) -> str:
    """`ranks 0-2 and 4 have A, rank 3 has B`."""
    holders: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        holders.setdefault(value, []).append(rank)
    return ", ".join(
        f"rank {ranks[0]} has {value}" if len(ranks) == 1 else f"ranks {_ranges(ranks)} have {value}"
        for value, ranks in holders.items()
    )


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers with runs of three or more written as `first-last`."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and runs[-1][-1] == n - 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    words = [f"{run[0]}-{run[-1]}" if len(run) > 2 else " and ".join(map(str, run)) for run in runs]
    return ", ".join(words)
