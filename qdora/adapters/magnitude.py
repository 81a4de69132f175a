"""DoRA's magnitude and the row norms that it is divided by (arXiv:2402.09353 §4).

||W + c BA|| is computed without ever holding W or BA (docs/math.md §3), once for each state of the factors:
it is used again under gradient accumulation, activation recomputation and generation.

A magnitude near 1 stored in bfloat16 does not train: its spacing there is 2⁻⁸ and every step of an optimizer
rounds away.  So the parameter is the offset from the frozen start, m = initial + offset, with the offset in
bfloat16 around 0, where the spacing is fine.

O out_features   I in_features   R rank
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.optim.optimizer import register_optimizer_step_post_hook

from qdora.adapters import kernels
from qdora.adapters.base import AdapterModule, Factors, adapter_parameter, full_tensor
from qdora.adapters.kernels import native
from qdora.adapters.tiles import scales_output
from qdora.config import MagnitudeStart
from qdora.quant.base import FrozenWeight
from qdora.quant.dense import DenseWeight


class Magnitude(AdapterModule):
    """m = initial + offset.

    Attributes:
        offset_O: (O,) parameter, zero at the start; None where the magnitude is frozen, m = initial.
        initial_O: (O,) frozen, at least float32, not 0: the row norms of a weight, or a loaded magnitude.
        start: which weight those are of.
    """

    initial_O: torch.Tensor
    offset_O: nn.Parameter | None

    def __init__(
        self,
        initial_O: torch.Tensor,
        dtype: torch.dtype = torch.bfloat16,
        *,
        frozen: bool = False,
        start: MagnitudeStart = "quantized",
    ) -> None:
        super().__init__()
        self.register_buffer("initial_O", initial_O, persistent=False)
        self.storage, self.start = dtype, start
        self.offset_O = None if frozen else adapter_parameter(torch.zeros_like(initial_O, dtype=dtype))

    def initial(self, name: str) -> torch.Tensor:
        """An offset of zero."""
        return torch.zeros(self.initial_O.shape)

    def value(self) -> torch.Tensor:
        """m: (O,), dtype of `initial_O`; a collective where the offset is sharded."""
        if self.offset_O is None:
            return self.initial_O
        return self.initial_O + full_tensor(self.offset_O, self.storage).to(self.initial_O.dtype)

    def start_from(self, norm_O: torch.Tensor) -> None:
        """Freeze the start at the row norms of a weight, (O,) at least float32."""
        self.initial_O = norm_O

    def load(self, m_O: torch.Tensor) -> None:
        """Start from a given magnitude: it becomes the frozen part, exactly, and the offset zero.

        A magnitude of 0, which an all-zero row has elsewhere, becomes the norm that such a row has here.
        """
        self.initial_O.copy_(m_O)
        least = torch.finfo(self.initial_O.dtype).tiny ** 0.5
        self.initial_O.masked_fill_(self.initial_O == 0, least)
        self.reset_parameters()

    def extra_repr(self) -> str:
        """Rows and dtype, for printing."""
        return f"{self.initial_O.shape[0]}, {'frozen' if self.offset_O is None else self.offset_O.dtype}"


def row_norms_squared(weight: FrozenWeight) -> torch.Tensor:
    """||W||² of each row: (O,), in the weight's norm dtype (at least float32)."""
    norms_O = torch.empty(weight.out_features, dtype=weight.norm_dtype, device=weight.device)
    for rows, w_tile in weight.tiles(weight.norm_dtype):
        torch.linalg.vector_norm(w_tile, dim=1, out=norms_O[rows])
    return norms_O.square_()


def original_norms(w_RI: torch.Tensor) -> torch.Tensor:
    """||W|| of the rows of an unquantized weight, as a magnitude starts from them: (R,), at least float32."""
    return positive_root(row_norms_squared(DenseWeight(w_RI)))


def weight_times_a(
    weight: FrozenWeight, a_RI: torch.Tensor, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """W Aᵀ: (O, R) in a dtype, the weight's norm dtype unless told otherwise, without a forward product."""
    dtype = dtype or weight.norm_dtype
    wa_OR = torch.empty(weight.out_features, a_RI.shape[0], dtype=dtype, device=weight.device)
    for rows, w_tile in weight.tiles(dtype):
        torch.mm(w_tile, a_RI.to(dtype).T, out=wa_OR[rows])
    return wa_OR


def factored_norm(
    w2_O: torch.Tensor, wa_OR: torch.Tensor, a_RI: torch.Tensor, b_OR: torch.Tensor, scale: float
) -> torch.Tensor:
    """||W + c BA|| of each row, from rank-sized products alone.

    ||W||² + 2c rowsum((W Aᵀ) ∘ B) + c² rowsum((B (A Aᵀ)) ∘ B)      (docs/math.md §3)

    Args:
        w2_O: (O,) squared row norms of W; their dtype is the dtype of the result.
        wa_OR: (O, R) W Aᵀ.
        a_RI, b_OR: the factors.
        scale: c.
    Returns: (O,)
    """
    dtype = w2_O.dtype
    a_RI = a_RI.to(dtype)
    if b_OR.shape[1] <= native.MAX_RANK and native.takes((w2_O, a_RI), (wa_OR, b_OR)):
        return native.factored_norm(w2_O, wa_OR, a_RI @ a_RI.T, b_OR, scale)
    b_OR, wa_OR = b_OR.to(dtype), wa_OR.to(dtype)
    # Both terms share the factor c B: rowsum((2 W Aᵀ + c B (A Aᵀ)) ∘ B) is one product and one sum.
    slope_OR = torch.addmm(wa_OR, b_OR, a_RI @ a_RI.T, beta=2, alpha=scale)
    norm2_O = torch.add(w2_O, torch.linalg.vecdot(slope_OR, b_OR), alpha=scale)
    return positive_root(norm2_O)


class _ExactNorm(torch.autograd.Function):
    """A norm that is known already, as a function of A and B (DoRA, arXiv:2402.09353 §4.3 and Table 7).

    ∂n/∂B = (c W Aᵀ + c² B A Aᵀ) / n,   ∂n/∂A = Bᵀ (c W + c² B A) / n      (docs/math.md §3)
    """

    @staticmethod
    def forward(
        ctx: Any,
        a_RI: torch.Tensor,
        b_OR: torch.Tensor,
        norm_O: torch.Tensor,
        wa_OR: torch.Tensor,
        weight: FrozenWeight,
        scale: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(a_RI, b_OR, norm_O, wa_OR)
        ctx.weight, ctx.scale = weight, scale
        return norm_O.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_O: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        a_RI, b_OR, norm_O, wa_OR = ctx.saved_tensors
        scale = ctx.scale
        pull_O = grad_O / norm_O
        pull_OR = pull_O[:, None] * b_OR
        # (pull ∘ B)ᵀ W, tile by tile: the one place where the exact gradient sees W again.
        grad_a = scale * scale * (pull_OR.T @ b_OR) @ a_RI
        for rows, w_tile in ctx.weight.tiles(a_RI.dtype):
            grad_a.addmm_(pull_OR[rows].T, w_tile, alpha=scale)
        grad_b = pull_O[:, None] * (scale * wa_OR + scale * scale * (b_OR @ (a_RI @ a_RI.T)))
        return grad_a, grad_b, None, None, None, None


def positive_root(norm2_O: torch.Tensor) -> torch.Tensor:
    """sqrt(max(norm2, tiny)), in place: norms are divided by.

    Rounding may take a row whose update cancels W a hair below zero; an all-zero row, which
    padded vocabularies have, has magnitude 0 and so stays zero instead of 0/0.
    """
    return norm2_O.clamp_min_(torch.finfo(norm2_O.dtype).tiny).sqrt_()


_steps = 0
"""Steps of all optimizers so far."""


def _count_the_step(optimizer: torch.optim.Optimizer, arguments: Any, keywords: Any) -> None:
    """Fused optimizers, those of other libraries and those that copy masters write without a version."""
    global _steps
    _steps += 1


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
        self._versions: tuple[float, ...] | None = None
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

    def is_fresh(self, factors: Factors | None) -> bool:
        """Whether the norm is known for the factors as they are now."""
        return self._norm_O is not None and self._versions == self._current(factors)

    def _current(self, factors: Factors | None) -> tuple[float, ...]:
        """Changes with every write to a factor, in place, by replacing the storage or by an optimizer."""
        if factors is None:
            return ()
        if self._watched is not None:
            return _steps, *(t._version for t in self._watched)
        numbers = (number for t in factors.tensors() for number in (t._version, t.data_ptr()))
        return _steps, factors.scale, *numbers

    @torch.no_grad()
    def norm(self, factors: Factors | None, dtype: torch.dtype | None = None) -> torch.Tensor:
        """(O,) a constant; computed on its own, with a pass over W, where it is stale.

        Args:
            dtype: of that pass, where it is no kernel's; the weight's norm dtype unless told otherwise.
        """
        if torch.compiler.is_compiling():
            # A graph cannot see whether a factor was written to, and the codes are quickly read.
            return self._compute(factors, dtype)
        if not self.is_fresh(factors):
            self._keep(factors, self._compute(factors, dtype))
        assert self._norm_O is not None
        return self._norm_O

    def for_product(
        self, factors: Factors | None, x_NI: torch.Tensor, *, exact: bool = False
    ) -> torch.Tensor | Callable[[torch.Tensor], torch.Tensor]:
        """The norm as `Scaling` takes it.

        Args:
            x_NI: what the product multiplies; with a stale norm that can ride along with it, it does.
            exact: differentiable in the factors.
        """
        if factors is None:
            return self.norm(None, x_NI.dtype)
        if exact:
            return self.differentiable_norm(factors)
        # In a graph the norm may be stale at any time.
        if scales_output(x_NI.dtype, x_NI.device) and (
            torch.compiler.is_compiling() or not self.is_fresh(factors)
        ):
            return partial(self.remember, factors)
        return self.norm(factors, x_NI.dtype)

    @torch.no_grad()
    def refresh(self, factors: Callable[[], Factors]) -> None:
        """Bring the norm up to date where there is a kernel for it, so that no forward pass has to.

        Args:
            factors: makes them; not called where they are sharded, and so at hand in a forward pass alone.
        """
        if self._watched is None and kernels.available(self._weight.device):
            self.norm(factors())

    def _compute(self, factors: Factors | None, dtype: torch.dtype | None) -> torch.Tensor:
        weight = self._weight
        by_kernel = kernels.available(weight.device) or torch.compiler.is_compiling()
        stored = weight.stored() if by_kernel and weight.norm_dtype == torch.float32 else None
        if stored is not None:
            if factors is None:
                return kernels.row_norm(stored)
            plain = factors.inner_R is None and factors.outer_O is None
            a_RI, b_OR = factors[:2] if plain else factors.combined(weight.norm_dtype)
            return kernels.row_norm(stored, a_RI, b_OR, factors.scale)
        if factors is None:
            return positive_root(self.squared_base().clone())
        return self._from_product(factors, weight_times_a(weight, factors.a_RI, dtype))

    def differentiable_norm(self, factors: Factors) -> torch.Tensor:
        """(O,) as `norm`, with its gradient in the factors."""
        a_RI, b_OR = factors.combined(self._weight.norm_dtype)
        if self._wa_OR is None or not self.is_fresh(factors):
            with torch.no_grad():
                wa_OR = weight_times_a(self._weight, a_RI)
                norm_O = factored_norm(self.squared_base(), wa_OR, a_RI, b_OR, factors.scale)
                self._keep(factors, norm_O)
                self._wa_OR = wa_OR
        assert self._norm_O is not None
        result: torch.Tensor = _ExactNorm.apply(  # type: ignore[no-untyped-call]
            a_RI, b_OR, self._norm_O, self._wa_OR, self._weight, factors.scale
        )
        return result

    @torch.no_grad()
    def remember(self, factors: Factors, wa_OR: torch.Tensor) -> torch.Tensor:
        """The norm from W Aᵀ of the stored A, (O, R), which a forward product brought along."""
        norm_O = self._from_product(factors, wa_OR)
        if not torch.compiler.is_compiling():
            self._keep(factors, norm_O)
        return norm_O

    def _from_product(self, factors: Factors, wa_OR: torch.Tensor) -> torch.Tensor:
        w2_O = self.squared_base()
        a_RI, b_OR = factors.combined(w2_O.dtype)
        if factors.inner_R is not None:
            wa_OR = wa_OR.to(w2_O.dtype) * factors.inner_R
        return factored_norm(w2_O, wa_OR, a_RI, b_OR, factors.scale)

    def _keep(self, factors: Factors | None, norm_O: torch.Tensor) -> None:
        self._norm_O, self._wa_OR, self._versions = norm_O, None, self._current(factors)

    def forget(self) -> None:
        """W has moved: everything is computed again where it lands."""
        self._w2_O = self._wa_OR = self._norm_O = self._versions = None
