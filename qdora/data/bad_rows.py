"""What happens to a row that cannot be used: stop, or skip and count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from qdora.data.example import Skipped
from qdora.errors import DataError

BadRows = Literal["stop", "skip"]


class BadRowError(Exception):
    """A row cannot become an example; the message is the reason, without the row's origin."""


def settle(skipped: Sequence[Skipped], bad_rows: BadRows) -> None:
    """Stop at the first bad row if the configuration says so.

    Raises: DataError: `bad_rows` is `stop` and a row is bad; names file and line, the reason,
        and how many more there are.
    """
    if bad_rows == "skip" or not skipped:
        return
    first, others = skipped[0], len(skipped) - 1
    more = f"; {others} more bad row{'s' if others > 1 else ''} after it" if others else ""
    raise DataError(f"{first.origin}: {first.reason}{more} (data.bad_rows: skip leaves such rows out)")
