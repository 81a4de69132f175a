"""Read a range of bytes of a file as memory of our own.

Mapping the file would be shorter, but mapped pages count as resident memory: streaming a
mapped 16-bit model shows the 16-bit model as the peak.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from qdora.errors import CheckpointError


def read_bytes(path: Path, start: int, count: int) -> npt.NDArray[np.uint8]:
    """Bytes `start` to `start + count` of a file.

    Returns: (count,) uint8.
    Raises: CheckpointError: the file ends before, or cannot be read.
    """
    try:
        raw = np.fromfile(path, dtype=np.uint8, count=count, offset=start)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    if raw.size != count:
        raise CheckpointError(f"{path}: truncated: it ends {count - raw.size} bytes too early")
    return raw
