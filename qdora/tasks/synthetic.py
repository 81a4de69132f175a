"""A seeded generator of grade-school word problems in the Orca-Math schema.

Every problem has a core: its kind, its wording and its numbers.  A hash of the core, not the seed,
decides whether it is a training or a test problem, and a seed gives each core one name and one
thing.  So no test problem is a training problem, whatever the seeds, and not even one with another
name in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from random import Random

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
    """One kind of problem: a chain of operations on small numbers, and several ways to word it.

    Numbers are small enough for a 135M model to compute, every number in a problem is needed, and a
    question names them in the order in which the solution takes them up, wherever the story allows it.
    """

    name: str
    operations: tuple[str, ...]
    """Applied from left to right: `+ - * /`, or `from`, which subtracts what there is so far from
    the next number."""
    ranges: tuple[Sequence[int], ...]
    """The values of a, b and c; combinations without an exact result in 1 to LARGEST are left out."""
    phrasings: tuple[str, ...]
    """Questions over {a} {b} {c}, {name} {other}, {items} {item} and {boxes} {box}."""


# fmt: off
KINDS: tuple[Kind, ...] = (
    Kind("gain", ("+",), (range(5, 61), range(3, 31)), (
        "{name} has {a} {items}. {other} gives {name} {b} more. How many {items} does {name} have now?",
        "{name} picks up {a} {items} and then {b} more. How many {items} does {name} pick up in all?",
        "There are {a} {items} on a table and {b} in a drawer. How many {items} are there altogether?",
        "{name} has {a} {items} and {other} has {b}. How many {items} do they have together?",
    )),
    Kind("loss", ("-",), (range(10, 61), range(3, 31)), (
        "{name} has {a} {items}. {name} gives {b} to {other}. How many {items} does {name} have left?",
        "There are {a} {items} in a {box}. {name} takes out {b}. How many {items} remain?",
        "{name} had {a} {items} and lost {b} of them. How many {items} does {name} have now?",
        "A shop has {a} {items} and sells {b}. How many {items} are left in the shop?",
    )),
    Kind("difference", ("-",), (range(10, 61), range(3, 31)), (
        "{name} has {a} {items}. {other} has {b}. How many more {items} does {name} have than {other}?",
        "{name} found {a} {items} and {other} found {b}. How many fewer {items} did {other} find?",
        "{name} needs {a} {items} but has only {b}. How many more {items} does {name} need?",
    )),
    Kind("groups", ("*",), (range(2, 13), range(2, 13)), (
        "{name} has {a} {boxes} with {b} {items} in each. How many {items} does {name} have?",
        "There are {a} {items} in every {box}. How many {items} are in {b} {boxes}?",
        "{name} gives {a} {items} to each of {b} friends. How many {items} does {name} give away?",
        "{name} lays out {a} rows of {b} {items}. How many {items} are there in total?",
    )),
    Kind("sharing", ("/",), (range(4, LARGEST + 1), range(2, 13)), (
        "{name} shares {a} {items} equally among {b} friends. How many {items} does each friend get?",
        "{name} puts {a} {items} into {b} {boxes} equally. How many {items} are in each {box}?",
        "Each {box} holds {b} {items}. How many {boxes} does {name} need for {a} {items}?",
    )),
    Kind("rate", ("*",), (range(2, 13), range(2, 13)), (
        "{name} makes {a} {items} an hour. How many {items} does {name} make in {b} hours?",
        "A machine packs {a} {items} a minute. How many {items} does it pack in {b} minutes?",
        "{name} walks {a} miles every day. How many miles does {name} walk in {b} days?",
        "{name} reads {a} pages a day. How many pages does {name} read in {b} days?",
    )),
    Kind("price", ("*",), (range(2, 13), range(2, 13)), (
        "One {item} costs {a} dollars. How many dollars do {b} {items} cost?",
        "{name} buys {a} {items} for {b} dollars each. How many dollars does {name} pay?",
        "{name} sells {a} {items} at {b} dollars each. How many dollars does {name} get?",
    )),
    Kind("two gains", ("+", "+"), (range(5, 31), range(3, 16), range(2, 11)), (
        "{name} has {a} {items}, buys {b} and finds {c}. How many {items} does {name} have now?",
        "There are {a} {items} in one {box}, {b} in another and {c} in a third. How many {items} in all?",
        "{name} has {a} {items}. {other} brings {b} and then {c} more. How many {items} are there now?",
    )),
    Kind("gain and loss", ("+", "-"), (range(5, 31), range(3, 16), range(2, 11)), (
        "{name} has {a} {items}, gets {b} more and gives away {c}. How many {items} does {name} have?",
        "A {box} holds {a} {items}. {name} adds {b} and takes out {c}. How many {items} are in it?",
        "{name} buys {a} {items}, then {b} more, and loses {c}. How many {items} does {name} have left?",
    )),
    Kind("two losses", ("-", "-"), (range(15, 51), range(3, 13), range(2, 10)), (
        "{name} has {a} {items}, gives {b} to {other} and loses {c}. How many {items} are left?",
        "A shop has {a} {items}. It sells {b} on Monday and {c} on Tuesday. How many {items} remain?",
        "{name} had {a} {items}. {other} took {b} and later {c} more. How many {items} does {name} have?",
    )),
    Kind("groups and more", ("*", "+"), (range(2, 10), range(2, 10), range(2, 16)), (
        "{name} has {a} {boxes} of {b} {items} and {c} loose ones. How many {items} does {name} have?",
        "{name} buys {a} {boxes} with {b} {items} each and finds {c} more. How many {items} are there?",
        "{name} makes {a} {items} a day for {b} days, then {c} more. How many {items} does {name} make?",
    )),
    Kind("groups and fewer", ("*", "-"), (range(2, 10), range(2, 10), range(2, 16)), (
        "{name} has {a} {boxes} of {b} {items} and gives away {c}. How many {items} are left?",
        "{name} earns {a} dollars an hour for {b} hours and spends {c}. How many dollars are left?",
        "There are {a} rows of {b} {items}. {name} removes {c}. How many {items} remain?",
    )),
    Kind("groups of two kinds", ("+", "*"), (range(2, 11), range(2, 11), range(2, 8)), (
        "Each {box} holds {a} red and {b} blue {items}. How many {items} are in {c} {boxes}?",
        "{name} collects {a} {items} every morning and {b} every evening. How many {items} in {c} days?",
        "{name} packs {a} big and {b} small {items} in each of {c} {boxes}. How many {items} is that?",
    )),
    Kind("pooling and sharing", ("+", "/"), (range(3, 31), range(3, 21), range(2, 8)), (
        "{name} has {a} {items} and buys {b}. {c} friends share them equally. How many does each get?",
        "{name} puts {a} red and {b} blue {items} into {c} equal {boxes}. How many are in each {box}?",
        "{name} and {other} bring {a} and {b} {items} and fill {c} {boxes} equally. How many in each?",
    )),
    Kind("change", ("*", "from"), (range(2, 10), range(2, 10), range(10, LARGEST + 1, 5)), (
        "{name} buys {a} {items} for {b} dollars each and pays with {c} dollars. How much change is due?",
        "{name} has {c} dollars and buys {a} {items} at {b} dollars each. How many dollars are left?",
        "{name} saves {a} dollars a week for {b} weeks. How many dollars are missing to {c}?",
    )),
    Kind("sharing and more", ("/", "+"), (range(6, 61), range(2, 9), range(2, 13)), (
        "{a} {items} are shared by {b} friends. One of them, {name}, had {c}. How many has {name} now?",
        "{name} splits {a} {items} into {b} equal {boxes} and adds {c} to one. How many are in it?",
    )),
)

NAMES: tuple[str, ...] = (
    "Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Henry", "Ivy", "Jack", "Kate", "Leo",
    "Maria", "Noah", "Olga", "Paul", "Rosa", "Sam", "Tina", "Victor", "Wendy", "Zoe",
)

ITEMS: Mapping[str, str] = {
    "apple": "apples", "balloon": "balloons", "bead": "beads", "book": "books", "bottle": "bottles",
    "button": "buttons", "card": "cards", "coin": "coins", "cookie": "cookies", "cup": "cups",
    "egg": "eggs", "flower": "flowers", "lemon": "lemons", "marble": "marbles", "orange": "oranges",
    "pen": "pens", "pencil": "pencils", "shell": "shells", "stamp": "stamps", "sticker": "stickers",
    "ticket": "tickets", "toy": "toys",
}

BOXES: Mapping[str, str] = {
    "bag": "bags", "basket": "baskets", "box": "boxes", "case": "cases", "crate": "crates",
    "jar": "jars", "pack": "packs", "tray": "trays",
}
# fmt: on


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
        for core in _cores_of(kind):
            by_split[_split_of(core)][i].append(core)
    return by_split


def _cores_of(kind: Kind) -> list[Core]:
    numbers = [n for n in product(*kind.ranges) if solve(kind.operations, n) is not None]
    return [Core(kind, i, n) for i in range(len(kind.phrasings)) for n in numbers]


def _split_of(core: Core) -> str:
    digest = hashlib.blake2b(core.key.encode(), digest_size=8).digest()
    return "train" if int.from_bytes(digest, "big") % _TEST_EVERY else "test"


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
    name, other = rng.sample(NAMES, 2)
    item, items = rng.choice(list(ITEMS.items()))
    box, boxes = rng.choice(list(BOXES.items()))
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
