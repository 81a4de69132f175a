"""A seeded generator of grade-school word problems in the Orca-Math schema.

Every problem has a core: its kind, its wording and its numbers.  A hash of the core, not the seed,
decides whether it is a training or a test problem, and a seed gives each core one name and one
thing.  So no test problem is a training problem, whatever the seeds, and not even one with another
name in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from random import Random

import yaml

from qdora.config import DatasetConfig
from qdora.data.rows import BadRows, Dataset, Example
from qdora.errors import InputError, suggest
from qdora.tasks.base import Task

_TEST_EVERY = 5
"""One core in so many is a test problem."""

LARGEST = 100
"""No number in a problem or its solution is larger."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of problem: operations on numbers small enough for a 135M model, and several phrasings.

    `synthetic.yaml` says what the fields mean.
    """

    name: str
    operations: list[str]
    ranges: list[list[int]]
    phrasings: list[str]


_WORDING = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))

KINDS = tuple(Kind(**kind) for kind in _WORDING["kinds"])
"""All kinds of problems, in the order of `synthetic.yaml`."""


@dataclass(frozen=True, slots=True)
class Core:
    """A problem without its names and things."""

    kind: Kind
    phrasing: int
    numbers: tuple[int, ...]

    @property
    def key(self) -> str:
        """A stable name, for hashing and seeding."""
        return f"{self.kind.name}/{self.phrasing}/{','.join(map(str, self.numbers))}"


def generate(split: str, count: int, seed: int) -> list[Example]:
    """The first `count` problems of a split; a smaller count gives the beginning of a larger one.

    The kinds take turns, so that each is there equally often until a small one is used up.

    Args:
        split: `train` or `test`; no problem is in both, whatever the seeds.
        count: how many.
        seed: decides the choice, the order, the names and the things.
    Raises: InputError: an unknown split, or more problems than there are.
    """
    available = capacity(split)
    if count > available:
        raise InputError(f"synthetic data: {count} {split} problems asked for, there are {available}")
    order = Random(f"{seed}/{split}")
    piles = [order.sample(cores, len(cores)) for cores in _cores()[split]]
    chosen: list[Core] = []
    while len(chosen) < count:
        piles = [pile for pile in piles if pile]
        chosen += [pile.pop() for pile in order.sample(piles, len(piles))]
    return [_to_example(core, seed, f"synthetic/{split}[{i}]") for i, core in enumerate(chosen[:count])]


def capacity(split: str) -> int:
    """How many different problems a split has.

    Raises: InputError: an unknown split.
    """
    if split not in Task.splits:
        raise InputError(f"synthetic data: split {split!r}; {suggest(split, Task.splits)}")
    return sum(len(cores) for cores in _cores()[split])


@cache
def _cores() -> dict[str, list[list[Core]]]:
    """The cores of each split, kind by kind."""
    by_split: dict[str, list[list[Core]]] = {split: [[] for _ in KINDS] for split in Task.splits}
    for i, kind in enumerate(KINDS):
        ranges = (range(first, last + 1, *step) for first, last, *step in kind.ranges)
        solvable = [numbers for numbers in product(*ranges) if solve(kind.operations, numbers)]
        for core in (Core(kind, j, numbers) for j in range(len(kind.phrasings)) for numbers in solvable):
            digest = hashlib.blake2b(core.key.encode(), digest_size=8).digest()
            split = "train" if int.from_bytes(digest, "big") % _TEST_EVERY else "test"
            by_split[split][i].append(core)
    return by_split


def solve(operations: Sequence[str], numbers: Sequence[int]) -> tuple[list[str], int] | None:
    """The worked equations and the result; None where a result is not whole, or not in 1 to LARGEST."""
    result, equations = numbers[0], []
    for operation, number in zip(operations, numbers[1:], strict=True):
        left, right = (number, result) if operation == "from" else (result, number)
        sign = "-" if operation == "from" else operation
        if sign == "/" and left % right:
            return None
        result = {"+": left + right, "-": left - right, "*": left * right, "/": left // right}[sign]
        if not 1 <= result <= LARGEST:
            return None
        equations.append(f"{left} {sign} {right} = {result}.")
    return equations, result


def _to_example(core: Core, seed: int, origin: str) -> Example:
    # A generator of its own for each core: its wording does not depend on what else is generated.
    rng = Random(f"{seed}/{core.key}")
    name, other = rng.sample(_WORDING["names"], 2)
    item, items = rng.choice(list(_WORDING["items"].items()))
    box, boxes = rng.choice(list(_WORDING["boxes"].items()))
    question = core.kind.phrasings[core.phrasing].format(
        **dict(zip("abc", core.numbers, strict=False)),
        name=name, other=other, item=item, items=items, box=box, boxes=boxes,
    )  # fmt: skip
    solved = solve(core.kind.operations, core.numbers)
    assert solved is not None  # unsolvable numbers never become a core
    equations, result = solved
    completion = " ".join([*equations, f"The answer is {result}."])
    return Example(question[0].upper() + question[1:], completion, str(result), "synthetic", origin)


class Synthetic(Task):
    """Generated problems; `count` says how many, nothing is read and nothing skipped."""

    required = ("count",)

    def load(self, config: DatasetConfig, bad_rows: BadRows) -> Dataset:
        """The first `limit` of `count` problems.

        Raises: InputError: more problems are asked for than the generator has.
        """
        assert config.count is not None  # a required key
        return Dataset(generate(config.split, config.count, config.seed)[: config.limit], [])


SYNTHETIC = Synthetic("synthetic", provenance="generated by qdora", licence="Apache-2.0", gold="solution")
