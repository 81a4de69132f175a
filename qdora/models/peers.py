"""What loading asks of the processes that share a model; a process alone is the simplest of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch

from qdora.quant.share import WHOLE, Share


class Peers(Protocol):
    """The processes that each hold a share of the model.

    Attributes:
        share: of this process.
        storage: the device that shards live on; None for the one they are computed on.
    """

    @property
    def share(self) -> Share: ...

    @property
    def storage(self) -> torch.device | None: ...

    def gather_rows(self, own: torch.Tensor, size: int) -> torch.Tensor:
        """Everybody's rows, `size` of them in order; each gives those of its share."""
        ...

    def gather(self, items: list[Any]) -> list[Any]:
        """Everybody's items, in order of rank."""
        ...

    def together(self) -> AbstractContextManager[None]:
        """A block after which an error of one process has ended it on all."""
        ...


class Alone:
    """One process that holds everything."""

    share = WHOLE
    storage = None

    def gather_rows(self, own: torch.Tensor, size: int) -> torch.Tensor:
        return own

    def gather(self, items: list[Any]) -> list[Any]:
        return items

    @contextmanager
    def together(self) -> Iterator[None]:
        yield
