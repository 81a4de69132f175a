"""Give freed memory back to the system while a model streams in."""

from __future__ import annotations

import ctypes
import ctypes.util
from collections.abc import Callable
from functools import cache

WORTH_TRIMMING = 1 << 20
"""Bytes of a tensor after which trimming pays."""


def release_freed_memory() -> None:
    """Return free pages of the C heap; without effect where the C library cannot.

    The short-lived 16-bit tensors of a stream leave holes between the 4-bit ones that stay.
    Left to itself glibc keeps those, and a process that holds a 4-bit model grows to the size
    of the 16-bit one.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        library = ctypes.CDLL(ctypes.util.find_library("c"))
        trim: Callable[[int], int] = library.malloc_trim
    except (OSError, AttributeError):
        return None
    return trim
