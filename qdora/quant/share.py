"""One rank's part of every sharded tensor: which rows it owns."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Share:
    """Part `rank` of `count`, along the first dimension, in the sizes of `torch.chunk`.

    All parts but the last ones have ceil(size / count) rows; where that does not divide, a later part is
    shorter or empty.  FSDP2 places its shards so.
    """

    rank: int
    count: int

    def rows(self, size: int) -> slice:
        """The rows that this rank owns of a tensor with `size` rows."""
        step = -(-size // self.count)
        return slice(min(size, self.rank * step), min(size, (self.rank + 1) * step))


WHOLE = Share(0, 1)
"""The share of a process that holds everything itself."""
