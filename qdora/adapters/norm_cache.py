"""When the row norms of an adapted weight are computed: once for each state of its factors.

They are used again until a factor changes: under gradient accumulation, activation
recomputation and generation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from qdora.adapters.norm import exact_norm, factored_norm, positive_root, row_norms_squared, weight_times_a
from qdora.adapters.update import Update
from qdora.quant.weight import FrozenWeight


def _count_the_step(optimizer: torch.optim.Optimizer, arguments: Any, keywords: Any) -> None:
    """Fused optimizers write parameters without counting a version, by which a stale norm is known."""
    for group in optimizer.param_groups:
        if group.get("fused"):
            torch.autograd.graph.increment_version(group["params"])


register_optimizer_step_post_hook(_count_the_step)


class NormCache:
    """||W + c BA||_row of one layer, in the weight's norm dtype.

    Args:
        weight: W; frozen, so ||W|| is computed once.
    """

    def __init__(self, weight: FrozenWeight) -> None:
        self._weight = weight
        self._w2_O: torch.Tensor | None = None
        self._wa_OR: torch.Tensor | None = None
        self._norm_O: torch.Tensor | None = None
        self._versions: tuple[int, ...] | None = None
        self._watched: Sequence[torch.Tensor] | None = None

    def watch(self, stored: Sequence[torch.Tensor]) -> None:
        """Know a change of the factors by a write to these, where those at hand are gathered copies of them.

        A gathered copy is written at every gather, without a version, into memory that comes and goes.
        """
        self._watched = stored

    @torch.no_grad()
    def squared_base(self) -> torch.Tensor:
        """||W||² of each row: (O,)."""
        if self._weight.device.type == "meta":
            return torch.empty(self._weight.out_features, dtype=self._weight.norm_dtype, device="meta")
        if self._w2_O is None:
            self._w2_O = row_norms_squared(self._weight)
        return self._w2_O

    def is_fresh(self, update: Update) -> bool:
        """Whether the norm is known for the factors as they are now."""
        return self._norm_O is not None and self._versions == self._current(update)

    def _current(self, update: Update) -> tuple[int, ...]:
        """Changes with every write to a factor, in place or by replacing the storage."""
        if self._watched is not None:
            return tuple(t._version for t in self._watched)
        return tuple(number for t in update.stored() for number in (t._version, t.data_ptr()))

    @torch.no_grad()
    def norm(self, update: Update | None) -> torch.Tensor:
        """(O,) a constant; computed on its own, with a pass over W, where it is stale."""
        if update is None:
            return positive_root(self.squared_base().clone())
        if not self.is_fresh(update):
            self.remember(update, weight_times_a(self._weight, update.a_RI))
        assert self._norm_O is not None
        return self._norm_O

    def differentiable_norm(self, update: Update) -> torch.Tensor:
        """(O,) as `norm`, with its gradient in the factors."""
        a_RI, b_OR = update.factors(self._weight.norm_dtype)
        if self._wa_OR is None or not self.is_fresh(update):
            with torch.no_grad():
                self._wa_OR = weight_times_a(self._weight, a_RI)
                self._norm_O = factored_norm(self.squared_base(), self._wa_OR, a_RI, b_OR, update.scale)
                self._versions = self._current(update)
        assert self._norm_O is not None
        return exact_norm(a_RI, b_OR, self._norm_O, self._wa_OR, self._weight, update.scale)

    @torch.no_grad()
    def remember(self, update: Update, wa_OR: torch.Tensor) -> torch.Tensor:
        """The norm from W Aᵀ of the stored A, (O, R), which a forward product brought along."""
        self._wa_OR = None
        w2_O = self.squared_base()
        a_RI, b_OR = update.factors(w2_O.dtype)
        if update.inner_R is not None:
            wa_OR = wa_OR.to(w2_O.dtype) * update.inner_R
        self._norm_O = factored_norm(w2_O, wa_OR, a_RI, b_OR, update.scale)
        self._versions = self._current(update)
        return self._norm_O

    def forget(self) -> None:
        """W has moved: everything is computed again where it lands."""
        self._w2_O = self._wa_OR = self._norm_O = self._versions = None
