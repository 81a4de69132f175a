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
from random import Random

from qdora.config import DatasetConfig
from qdora.data.rows import Dataset, Example, fingerprint
from qdora.errors import InputError, suggest
from qdora.tasks.problem_kinds import BOXES, ITEMS, KINDS, LARGEST, NAMES, Kind

SPLITS = ("train", "test")
_TEST_SHARE = 5
"""One core in so many is a test problem."""


@dataclass(frozen=True, slots=True)
class Core:
    """What makes a problem that problem, whoever it is told about."""

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
        split: `train` or `test`; they share no problem, whatever the seeds.
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
    return [_tell(core, seed, f"synthetic/{split}[{i}]") for i, core in enumerate(chosen[:count])]


def capacity(split: str) -> int:
    """How many different problems a split has.

    Raises: InputError: an unknown split.
    """
    if split not in SPLITS:
        raise InputError(f"synthetic data: split {split!r}; {suggest(split, SPLITS)}")
    return sum(len(cores) for cores in _cores()[split])


@cache
def _cores() -> dict[str, list[list[Core]]]:
    """The cores of each split, kind by kind."""
    by_split: dict[str, list[list[Core]]] = {split: [[] for _ in KINDS] for split in SPLITS}
    for i, kind in enumerate(KINDS):
        for core in _cores_of(kind):
            by_split[_split_of(core)][i].append(core)
    return by_split


def _cores_of(kind: Kind) -> list[Core]:
    numbers = [n for n in product(*kind.ranges) if solve(kind.operations, n) is not None]
    return [Core(kind, i, n) for i in range(len(kind.phrasings)) for n in numbers]


def _split_of(core: Core) -> str:
    digest = hashlib.blake2b(core.key.encode(), digest_size=8).digest()
    return "train" if int.from_bytes(digest, "big") % _TEST_SHARE else "test"


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


def _tell(core: Core, seed: int, origin: str) -> Example:
    # A generator of its own for each core: its wording does not depend on what else is generated.
    cast = Random(f"{seed}/{core.key}")
    name, other = cast.sample(NAMES, 2)
    item, items = cast.choice(list(ITEMS.items()))
    box, boxes = cast.choice(list(BOXES.items()))
    question = core.kind.phrasings[core.phrasing].format(
        **dict(zip("abc", core.numbers, strict=False)),
        name=name, other=other, item=item, items=items, box=box, boxes=boxes,
    )  # fmt: skip
    solved = solve(core.kind.operations, core.numbers)
    assert solved is not None  # unsolvable numbers never become a core
    equations, result = solved
    completion = " ".join([*equations, f"The answer is {result}."])
    return Example(question[0].upper() + question[1:], completion, str(result), "synthetic", origin)


def load_synthetic(config: DatasetConfig) -> Dataset:
    """Generated problems; nothing is read, so nothing is skipped.

    Raises: InputError: more problems are asked for than the generator has.
    """
    assert config.count is not None  # DatasetConfig checks it
    examples = generate(config.split, config.count, config.seed)[: config.limit]
    return Dataset(examples, [], fingerprint(examples))
