"""Tell an error that another process of the run has caused from all others."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from torch.distributed import DistError


def lost_process(error: BaseException) -> str | None:
    """A sentence on a process that has ended or does not answer; None for any other error.

    Args:
        error: what an exchange between processes raised, or what was raised because of it.
    """
    cause: BaseException | None = error
    while cause is not None:
        # gloo's errors are plain RuntimeErrors that begin with the place in its source.
        if isinstance(cause, DistError) or (
            isinstance(cause, RuntimeError) and "gloo/transport" in str(cause)
        ):
            reason = str(cause).partition("\n")[0]
            return (
                "another process of this run has ended or does not answer, so this one ends too; the other's "
                "own output says why. A training run goes on from its last checkpoint with --resume. "
                f"What this process saw: {reason}"
            )
        cause = cause.__cause__ or cause.__context__
    return None


def leave(code: int) -> NoReturn:
    """End this process at once.

    An ordinary exit waits for threads of torch that wait for the lost process, or aborts in them.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
