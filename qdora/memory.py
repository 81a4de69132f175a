"""What glibc's heap does with freed memory: returned while a model is loaded, kept while one is trained."""

from __future__ import annotations

import ctypes
from functools import cache

# Parameters of mallopt, from malloc.h, and the largest threshold that glibc takes on 64 bits.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 << 20

WORTH_TRIMMING = 1 << 20
"""Bytes of a freed tensor from which on `release_freed_memory` pays."""


def release_freed_memory() -> None:
    """Return free pages of the C heap; without effect where the C library cannot.

    The short-lived 16-bit tensors of a loading model leave holes between the 4-bit ones that stay.
    By default glibc keeps those, and a process that holds a 4-bit model grows to the size of the
    16-bit one.
    """
    if hasattr(_libc(), "malloc_trim"):
        _libc().malloc_trim(0)


def keep_freed_memory() -> None:
    """Let the C heap keep what a training step frees, for the next step to take again.

    By default glibc returns large blocks to the system and gets them back zeroed, page by page: thousands
    of page faults a step.  The peak stays the same.  Without effect where the C library cannot.
    """
    if hasattr(_libc(), "mallopt"):
        _libc().mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        _libc().mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)  # the symbols of this process, which is linked to the C library
