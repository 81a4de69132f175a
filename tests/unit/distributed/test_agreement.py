"""What the messages say when processes do not agree; tests/distributed has the processes."""

from __future__ import annotations

from typing import Any

import pytest

from qdora.distributed.context import DistributedContext
from qdora.errors import InputError
from qdora.output import LOCK
from qdora.run import RunDirectory


class Recorded(DistributedContext):
    """A context whose other ranks have answered already."""

    def __init__(self, everyones: list[Any]) -> None:
        super().__init__(0, len(everyones))
        self.everyones, self.given = everyones, []

    def gather(self, items: list[Any]) -> list[Any]:
        self.given += items
        return self.everyones


def test_a_disagreement_names_the_facts_and_who_has_which_value():
    """Catches: a message without the fact, the ranks or the values; facts that agree listed as well."""
    everyones = [{"the data": "a", "torch": "2.13"} for _ in range(6)]
    everyones[3] = {"the data": "b", "torch": "2.13"}
    everyones[5] = {"torch": "2.14"}
    processes = Recorded(everyones)
    with pytest.raises(InputError) as caught:
        processes.refuse_disagreement({"the data": "a", "torch": "2.13"})
    assert processes.given == [{"the data": "a", "torch": "2.13"}]
    words = str(caught.value)
    assert "the data: ranks 0-2, 4 have a, rank 3 has b, rank 5 has nothing" in words
    assert "torch: ranks 0-4 have 2.13, rank 5 has 2.14" in words


def test_the_same_facts_pass():
    """Catches: a refusal of a good run."""
    Recorded([{"the data": "a"}] * 3).refuse_disagreement({"the data": "a"})


def test_an_error_elsewhere_is_raised_here_with_its_rank():
    """Catches: a rank that goes on after another has failed; ours and foreign errors told apart."""
    processes = Recorded([None, "OSError: disk", None, "no such column"])
    with (
        pytest.raises(InputError, match=r"^rank 1: OSError: disk; rank 3: no such column$"),
        processes.raise_on_all_ranks(),
    ):
        pass
    assert processes.given == [None]


@pytest.mark.parametrize(
    ("error", "told"), [(InputError("no such column"), "no such column"), (KeyError("a"), "KeyError: 'a'")]
)
def test_an_error_here_is_told_and_stays_what_it_is(error, told):
    """Catches: an own error that changes its kind and so the exit code, or that the others never hear of."""
    processes = Recorded([told, None])
    with pytest.raises(type(error)) as caught, processes.raise_on_all_ranks():
        raise error
    assert caught.value is error
    assert processes.given == [told]


@pytest.mark.parametrize("rank", [0, 1])
def test_the_main_rank_alone_holds_a_lock(tmp_path, rank):
    """Catches: a second rank that finds the run locked by the first, or a run that no rank has locked."""
    ranks = Recorded([None, None])
    ranks.rank = rank
    with ranks.on_main_rank(RunDirectory(tmp_path / "run").locked):
        assert (tmp_path / "run" / LOCK).exists() == (rank == 0)
    assert not (tmp_path / "run").exists()


def test_a_lock_that_the_main_rank_cannot_have_ends_all_ranks(tmp_path):
    """Catches: ranks that wait for a main rank that has ended."""
    ranks = Recorded(["is in use", None])
    ranks.rank = 1
    with (
        pytest.raises(InputError, match="rank 0: is in use"),
        ranks.on_main_rank(RunDirectory(tmp_path / "run").locked),
    ):
        raise AssertionError
