"""The process in which math-verify works: a script that answers one line of JSON with another.

It is run by its path and imports nothing of this project.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from typing import Any

from math_verify import parse, verify

_MOST_MEMORY = 4 << 30
"""Bytes of address space: 9^{9^{9}} would take all that there is."""


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    resource.setrlimit(resource.RLIMIT_AS, (_MOST_MEMORY, _MOST_MEMORY))


def _answer(output: str, gold: str) -> dict[str, Any]:
    """What math-verify reads in both, and whether that is the same.

    Its own time limits are alarms in this process; the one that asked has one for all.
    """
    try:
        found = [parse(text, parsing_timeout=None) for text in (output, gold)]
        texts = [str(of[-1]) if of else None for of in found]
        same = bool(verify(found[1], found[0], timeout_seconds=None))
    except (Exception, MemoryError, RecursionError):
        return {"extracted": None, "gold": None, "correct": False}
    return {"extracted": texts[0], "gold": texts[1], "correct": same}


def main() -> None:
    """Answer until there are no more questions."""
    logging.disable()
    # What sympy or a parser prints must not come between the answers, nor on the user's terminal.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.dup2(nowhere, sys.stderr.fileno())
    _limit_memory()
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(_answer(*json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
