"""Put bugs in and say which were caught."""

from __future__ import annotations

import sys

from tests.mutants import MUTANTS
from tests.mutation import fails


def main(names: list[str]) -> int:
    """Put in each bug; how many went unnoticed."""
    survivors = 0
    for name in names or MUTANTS:
        caught = fails(MUTANTS[name], MUTANTS[name].test)
        survivors += not caught
        print(f"{'caught' if caught else 'SURVIVED':<9} {name:<34} {MUTANTS[name].test}", flush=True)
    return survivors


if __name__ == "__main__":
    sys.exit(1 if main(sys.argv[1:]) else 0)
