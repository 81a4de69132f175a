"""Errors a user can cause, and the nearest name to what they typed.

Everything a user can get wrong is an `InputError`: commands print its message
without a traceback and exit with code 2.  Any other exception is our bug.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from importlib.util import find_spec


class InputError(ValueError):
    """Bad input: the message names what came, what is allowed and the nearest name."""


class DataError(InputError):
    """A row of a data file cannot be used; the message names file and line."""


class MissingPathError(InputError):
    """A file or folder is not there; the message names what was expected, and what is there."""


class MissingDataError(InputError):
    """The file or folder of a data set is not there.

    Attributes:
        what: says so.
        keys: of the configuration, which have the path.
    """

    def __init__(self, what: str, keys: Sequence[str], how: str | None = None) -> None:
        """
        Args:
            what, keys: as the attributes.
            how: to set the keys, as a part of a sentence; None where the command takes them with `--set`.
        """
        self.what, self.keys = what, keys
        how = how or "with " + " ".join(f"--set {key}=PATH" for key in keys)
        super().__init__(f"{what}; say where it is {how}")


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


EXTRAS = {"matplotlib": "plots", "gguf": "gguf", "lm_eval": "eval", "triton": "gpu"}
"""Modules that a plain installation lacks: the extra that brings each."""


def not_installed(module: str) -> str | None:
    """What to install for a module of an extra; None where it is there."""
    if find_spec(module) is not None:
        return None
    return f'the package {module}, which is not installed: pip install "qdora[{EXTRAS[module]}]"'


def require(module: str, what: str) -> None:
    """Refuse what needs a module of an extra.

    Args:
        what: begins the sentence.
    Raises: InputError: it is not installed; with the extra that brings it.
    """
    if lacking := not_installed(module):
        raise InputError(f"{what} needs {lacking}")


def nearest(name: str, allowed: Iterable[str]) -> str | None:
    """The allowed name that is most similar; None where none is similar."""
    return next(iter(difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.5)), None)


def suggest(name: str, allowed: Iterable[str]) -> str:
    """A sentence with the nearest allowed name (where one is near) and all the allowed ones."""
    names = sorted(allowed)
    near = nearest(name, names)
    hint = f"did you mean {near!r}? " if near else ""
    return f"{hint}allowed: {', '.join(names)}"
