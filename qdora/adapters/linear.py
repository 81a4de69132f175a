"""The one layer of all methods: a frozen weight, an optional direction, an optional magnitude."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from qdora.adapters import math
from qdora.adapters.direction import LowRank
from qdora.adapters.magnitude import Magnitude
from qdora.adapters.methods import METHODS
from qdora.config import AdapterConfig, BaseKind
from qdora.errors import InputError
from qdora.quant.dense import DenseWeight
from qdora.quant.nf4 import NF4Weight
from qdora.quant.weight import FrozenWeight


def _count_the_step(optimizer: torch.optim.Optimizer, arguments: Any, keywords: Any) -> None:
    """Fused optimizers write parameters without counting a version, by which a stale norm is known."""
    for group in optimizer.param_groups:
        if group.get("fused"):
            torch.autograd.graph.increment_version(group["params"])


register_optimizer_step_post_hook(_count_the_step)

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class AdaptedLinear(nn.Module):
    """y = s * (W x + c B A drop(x)) + bias,  s = m / ||W + c BA||_row  (1 without a magnitude).

    The norm is a constant in backward (DoRA, arXiv:2402.09353 §4.3).  It is computed when
    A or B have changed, from a product that rides along with the forward pass, and used
    again until they change: under gradient accumulation, activation recomputation and generation.

    Attributes:
        base: the frozen (O, I) weight.
        bias: (O,) frozen, or None; the magnitude does not scale it.
        direction, magnitude: the adapter; None where the method has none.
    """

    base: nn.Module
    direction: LowRank | None
    magnitude: Magnitude | None

    def __init__(self, weight: FrozenWeight, bias_O: torch.Tensor | None = None) -> None:
        super().__init__()
        assert isinstance(weight, nn.Module)
        self.base = weight
        self.bias = None if bias_O is None else nn.Parameter(bias_O.detach(), requires_grad=False)
        self.direction = self.magnitude = None
        self._w2_O: torch.Tensor | None = None
        self._norm_O: torch.Tensor | None = None
        self._norm_versions: tuple[int, ...] | None = None

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: AdapterConfig, *, seed: int = 0) -> AdaptedLinear:
        """Adapt one linear layer: quantize its weight where the method says so, add the adapter.

        Args:
            linear: its weight is taken over, not copied, where it stays dense.
            config: the method, rank and scale; its targets are not looked at.
            seed: of A.
        Raises: InputError: r is larger than a side of the layer, or NF4 cannot hold its shape.
        """
        layer = cls.of_linear(linear, METHODS[config.method].base)
        layer.add_adapter(config, seed=seed)
        return layer

    @classmethod
    def of_linear(cls, linear: nn.Linear, base: BaseKind) -> AdaptedLinear:
        """The same layer with a frozen base of the given kind and no adapter.

        Raises: InputError: NF4 cannot hold the weight's shape.
        """
        w_OI = linear.weight.detach()
        if base == "dense":
            return cls(DenseWeight(w_OI), linear.bias)
        try:
            return cls(NF4Weight.quantize(w_OI), linear.bias)
        except ValueError as error:
            raise InputError(str(error)) from None

    @property
    def weight_source(self) -> FrozenWeight:
        """The frozen weight, as something that gives tiles."""
        return cast(FrozenWeight, self.base)

    @property
    def in_features(self) -> int:
        """I."""
        return self.weight_source.in_features

    @property
    def out_features(self) -> int:
        """O."""
        return self.weight_source.out_features

    def add_adapter(
        self,
        config: AdapterConfig,
        *,
        direction: bool | None = None,
        magnitude: bool | None = None,
        seed: int = 0,
    ) -> None:
        """Give the layer a fresh adapter; its output does not change yet.

        Args:
            direction, magnitude: whether to have them; as the method says where None.
        Raises: InputError: r is larger than a side of the layer.
        """
        spec = METHODS[config.method]
        device, dtype = self.weight_source.device, DTYPES[config.dtype]
        if spec.direction if direction is None else direction:
            refuse_large_rank(config.r, "this layer", self.out_features, self.in_features)
            self.direction = LowRank(
                self.in_features,
                self.out_features,
                config.r,
                scale=config.scale,
                dropout=config.dropout,
                dtype=dtype,
                device=device,
                seed=seed,
            )
        if spec.magnitude if magnitude is None else magnitude:
            self._w2_O = math.row_norms_squared(self.weight_source)
            self.magnitude = Magnitude(self._w2_O.sqrt(), dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer.

        Args:
            x: (..., I), compute dtype.
        Returns: (..., O), dtype of x.
        """
        x_NI = x.reshape(-1, self.in_features)
        direction = self.direction
        with_wa = self.magnitude is not None and direction is not None and not self._norm_is_fresh()
        u_NO, wa_OR = math.low_rank_linear(
            x_NI,
            self.weight_source,
            None if direction is None else direction.a_RI,
            None if direction is None else direction.b_OR,
            scale=1.0 if direction is None else direction.scale,
            dropout=direction.dropout if direction is not None and self.training else 0.0,
            with_wa=with_wa,
        )
        if self.magnitude is not None:
            if wa_OR is not None:
                self._remember_norm(wa_OR)
            y_NO = math.scale_rows(u_NO, self.row_scale(), self.bias)
        else:
            y_NO = u_NO if self.bias is None else u_NO + self.bias.to(u_NO.dtype)
        return y_NO.view(*x.shape[:-1], self.out_features)

    def row_scale(self) -> torch.Tensor:
        """s: (O,) at least float32, differentiable in m; ones where there is no magnitude."""
        if self.magnitude is None:
            return torch.ones(self.out_features, device=self.weight_source.device)
        return math.row_scale(self.magnitude.value(), self.weight_norm())

    @torch.no_grad()
    def weight_norm(self) -> torch.Tensor:
        """||W + c BA|| of each row: (O,) at least float32, constant in backward."""
        if self._w2_O is None:
            self._w2_O = math.row_norms_squared(self.weight_source)
        if self.direction is None:
            return self._w2_O.sqrt()
        if not self._norm_is_fresh():
            self._remember_norm(math.weight_times_a(self.weight_source, self.direction.a_RI))
        assert self._norm_O is not None
        return self._norm_O

    @torch.no_grad()
    def merged(self, dtype: torch.dtype, onto: FrozenWeight | None = None) -> torch.Tensor:
        """s (W + c BA) as one (O, I) tensor of `dtype`, computed tile by tile in float32.

        Args:
            onto: another W to put the adapter on, the original 16-bit one for example.
        """
        weight = self.weight_source if onto is None else onto
        scale_O = self._merged_scale(weight)
        merged_OI = torch.empty(self.out_features, self.in_features, dtype=dtype, device=weight.device)
        for rows, w_tile in weight.tiles(weight.norm_dtype):
            if self.direction is not None:
                b_tile, a_RI = self.direction.b_OR[rows], self.direction.a_RI
                update = b_tile.to(w_tile.dtype) @ a_RI.to(w_tile.dtype)
                w_tile = torch.add(w_tile, update, alpha=self.direction.scale)
            merged_OI[rows] = w_tile * scale_O[rows, None]
        return merged_OI

    def _merged_scale(self, weight: FrozenWeight) -> torch.Tensor:
        if weight is self.weight_source or self.magnitude is None:
            return self.row_scale()
        w2_O = math.row_norms_squared(weight)
        if self.direction is None:
            return math.row_scale(self.magnitude.value(), w2_O.sqrt())
        a_RI, b_OR = self.direction.a_RI, self.direction.b_OR
        wa_OR = math.weight_times_a(weight, a_RI)
        norm_O = math.factored_norm(w2_O, wa_OR, a_RI, b_OR, self.direction.scale)
        return math.row_scale(self.magnitude.value(), norm_O)

    def _versions(self) -> tuple[int, ...]:
        """Changes with every write to A or B, in place or by replacing the storage."""
        assert self.direction is not None
        a_RI, b_OR = self.direction.a_RI, self.direction.b_OR
        return a_RI._version, b_OR._version, a_RI.data_ptr(), b_OR.data_ptr()

    def _norm_is_fresh(self) -> bool:
        return self._norm_versions == self._versions()

    @torch.no_grad()
    def _remember_norm(self, wa_OR: torch.Tensor) -> None:
        assert self.direction is not None
        if self._w2_O is None:
            self._w2_O = math.row_norms_squared(self.weight_source)
        self._norm_O = math.factored_norm(
            self._w2_O, wa_OR, self.direction.a_RI, self.direction.b_OR, self.direction.scale
        )
        self._norm_versions = self._versions()

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        # The cached norms do not follow a move of the module: they are computed again where it lands.
        self._w2_O = self._norm_O = self._norm_versions = None
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]


def refuse_large_rank(r: int, name: str, out_features: int, in_features: int) -> None:
    """A rank above the smaller side of the layer gains nothing over a full matrix.

    Raises: InputError: naming the layer, its shape and the largest rank.
    """
    side = min(out_features, in_features)
    if r > side:
        raise InputError(
            f"adapter.r is {r}, larger than the smaller side of {name} ({out_features}x{in_features}); "
            f"allowed: 1 to {side}"
        )
