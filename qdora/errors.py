"""Errors a user can cause, and the nearest name to what they typed.

Everything a user can get wrong is an `InputError`: commands print its message
without a traceback and exit with code 2.  Any other exception is our bug.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input: the message names what came, what is allowed and the nearest name."""


class DataError(InputError):
    """A row of a data file cannot be used; the message names file and line."""


class CheckpointError(InputError):
    """A checkpoint or safetensors file is missing, truncated or corrupt."""


class InterruptedRunError(Exception):
    """A run stopped on request after writing a checkpoint.

    Attributes:
        exit_code: 128 + the number of the signal, as a shell reports it.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def nearest(name: str, allowed: Iterable[str]) -> str | None:
    """The allowed name that is most similar; None where none is similar."""
    return next(iter(difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.5)), None)


def suggest(name: str, allowed: Iterable[str]) -> str:
    """A sentence with the nearest allowed name (where one is near) and all the allowed ones."""
    names = sorted(allowed)
    near = nearest(name, names)
    hint = f"did you mean {near!r}? " if near else ""
    return f"{hint}allowed: {', '.join(names)}"
