"""The one layer of all adapters: a frozen weight, an optional low-rank update, an optional magnitude."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import nn
from torch.nn import functional as F

from qdora.adapters import UPDATES
from qdora.adapters.base import DTYPES, Factors, LowRankUpdate
from qdora.adapters.magnitude import Magnitude, NormCache, original_norms
from qdora.adapters.product import Scaling, adapted_product
from qdora.config import AdapterConfig, QuantizationName
from qdora.errors import InputError
from qdora.quant import Quantization
from qdora.quant.base import FrozenWeight
from qdora.quant.dense import DenseWeight


class AdaptedLinear(nn.Module):
    """y = s ∘ (W x + c B A drop(x)) + bias,  s = m / ||W + c BA||_row  (1 without a magnitude).

    The norm is a constant in backward (DoRA, arXiv:2402.09353 §4.3) unless its exact gradient
    is asked for.  It is computed when a factor has changed, and used again until one changes: by a kernel
    where there is one, else in float32 from a product that rides along with the forward pass, in 16 bits
    before it.

    Attributes:
        base: the (O, I) weight; frozen but for full fine-tuning.
        bias: (O,) or None; the magnitude does not scale it.
        update, magnitude: the adapter; None where there is none.
        enabled: False computes the base alone; the adapter stays as it is.
        exact_norm_gradient: differentiate the norm.
        published_dropout: also drop the inputs of (s - 1) W x, as the published code does.
    """

    base: FrozenWeight
    update: LowRankUpdate | None
    magnitude: Magnitude | None

    def __init__(self, weight: FrozenWeight, bias_O: torch.Tensor | None = None) -> None:
        super().__init__()
        self.base = weight
        self.bias = None if bias_O is None else nn.Parameter(bias_O.detach(), requires_grad=False)
        self.update = self.magnitude = None
        self.enabled = True
        self.exact_norm_gradient = self.published_dropout = False
        self._norms = NormCache(weight)
        # In a tuple, so that it is no submodule: a merged copy is not part of the model's state.
        self._merged: tuple[DenseWeight, ...] = ()
        self._folded: Callable[[torch.Tensor], torch.Tensor] | None = None

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        config: AdapterConfig,
        *,
        quantization: QuantizationName = "nf4",
        seed: int = 0,
    ) -> AdaptedLinear:
        """Adapt one linear layer: quantize its weight, add the adapter.

        Args:
            linear: its weight is taken over, not copied, where it stays dense.
            config: kind, rank and scale; its targets and patterns are not looked at.
            quantization: format of the frozen weight.
            seed: of the adapter's random values.
        Raises: InputError: r is larger than a side of the layer, or the format cannot hold its shape.
        """
        try:
            layer = cls(Quantization(quantization).from_dense(linear.weight.detach()), linear.bias)
        except ValueError as error:
            raise InputError(str(error)) from None
        refuse_large_rank(config, "this layer", layer.shape)
        layer.add_adapter(config, seed=seed, original_OI=linear.weight.detach())
        return layer

    @property
    def in_features(self) -> int:
        """I."""
        return self.base.in_features

    @property
    def out_features(self) -> int:
        """O."""
        return self.base.out_features

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return self.out_features, self.in_features

    @property
    def weight(self) -> torch.Tensor:
        """Shape, dtype and device of W, for models that ask for them as T5 does; its values are NaN.

        Its dtype is float32 where W is quantized.  A module that computed with W and did not call the layer
        would leave out the adapter unseen; NaN is seen.
        """
        stored = getattr(self.base, "weight", None)
        dtype = self.base.norm_dtype if stored is None else stored.dtype
        return torch.full((), torch.nan, dtype=dtype, device=self.base.device).expand(self.shape)

    @property
    def has_adapter(self) -> bool:
        """Whether there is a low-rank update or a magnitude."""
        return self.update is not None or self.magnitude is not None

    @property
    def is_merged(self) -> bool:
        """Whether the adapter is merged into a copy of the weight."""
        return bool(self._merged)

    def add_adapter(
        self,
        config: AdapterConfig,
        *,
        update: bool = True,
        magnitude: bool | None = None,
        seed: int = 0,
        shared: Any = None,
        original_OI: torch.Tensor | None = None,
    ) -> None:
        """Give the layer a fresh adapter; its output does not change yet.

        But for a magnitude that starts from the original weight: that scales by what quantization did to the
        norm of each row.

        Args:
            update: whether to have the configured low-rank update.
            magnitude: whether to have a magnitude; as configured where None.
            seed: of the update's random values.
            shared: what the updates of all layers have in common, of `LowRankUpdate.create_shared`.
            original_OI: that the frozen weight was quantized from; for a magnitude that starts from it, and
                where the layer is on the meta device that gets it as the weights are loaded.
        """
        kind, device = UPDATES[config.type], self.base.device
        self.exact_norm_gradient = config.norm_gradient == "exact"
        self.published_dropout = config.dropout_placement == "published"
        if update and kind is not None:
            self.update = kind(self.shape, config, device, seed, shared)
        if config.dora if magnitude is None else magnitude:
            initial_O = torch.empty(self.out_features, dtype=self.base.norm_dtype, device=device)
            self.magnitude = Magnitude(
                initial_O,
                DTYPES[config.dtype],
                frozen=config.magnitude == "frozen",
                start=config.magnitude_start,
            )
            if config.magnitude_start == "original" and device.type != "meta":
                assert original_OI is not None, "the weight that this layer was quantized from"
                self.magnitude.start_from(original_norms(original_OI).to(self.base.norm_dtype))
        if device.type != "meta":
            self.reset_from_weight()

    @torch.no_grad()
    def reset_from_weight(self) -> None:
        """Start what starts from the weight: the magnitude, and an update made of its singular vectors.

        The weight must be materialized and full, and the adapter at its initial values.
        """
        norm_of = None
        if self.update is not None:
            rest_OI = self.update.reset_from_weight(self.base)
            if rest_OI is not None:
                self.replace_base(rest_OI)
                norm_of = self.update.factors()
        self._norms.forget()
        if self.magnitude is not None:
            norm_O = self._norms.norm(norm_of)  # kept for the first pass, whatever the magnitude starts from
            if self.magnitude.start == "quantized":
                self.magnitude.start_from(norm_O.clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer.

        Args:
            x: (..., I), compute dtype.
        Returns: (..., O), dtype of x.
        """
        x_NI = x.reshape(-1, self.in_features)
        if self._folded is not None and self.enabled and not torch.is_grad_enabled():
            y_NO = self._folded(x_NI)
        else:
            y_NO = self._adapted(x_NI) if self.enabled and not self.is_merged else self._plain(x_NI)
        return y_NO.view(*x.shape[:-1], self.out_features)

    def _adapted(self, x_NI: torch.Tensor) -> torch.Tensor:
        update = self.update
        factors = None if update is None else update.factors()
        dropout = update.dropout if update is not None and self.training else 0.0
        x_dropped_NI = None
        if dropout and self.published_dropout and self.magnitude is not None:
            kept_NI = F.dropout(x_NI, dropout)
            x_NI, x_dropped_NI, dropout = kept_NI, x_NI - kept_NI, 0.0
        y_NO = adapted_product(
            x_NI,
            self.base,
            factors=factors,
            scaling=self._scaling(factors, x_NI),
            bias_O=self.bias,
            dropout=dropout,
        )
        # W x + (s - 1) W drop(x) + s c B A drop(x)  =  s (W + c BA) drop(x) + W (x - drop(x))
        return y_NO if x_dropped_NI is None else y_NO + adapted_product(x_dropped_NI, self.base)

    def _plain(self, x_NI: torch.Tensor) -> torch.Tensor:
        if self.is_merged and self.enabled and self.training and torch.is_grad_enabled():
            raise RuntimeError("a merged adapter gets no gradient: unmerge before training")
        if not self.is_merged or not self.enabled:
            return adapted_product(x_NI, self.base, bias_O=self.bias)
        (merged,) = self._merged
        if merged.weight.dtype == x_NI.dtype and not torch.is_grad_enabled():
            return F.linear(x_NI, merged.weight, self.bias)  # what the product asks and keeps costs time
        return adapted_product(x_NI, merged, bias_O=self.bias)

    def _scaling(self, factors: Factors | None, x_NI: torch.Tensor) -> Scaling | None:
        if self.magnitude is None:
            return None
        norm_O = self._norms.for_product(factors, x_NI, exact=self.exact_norm_gradient)
        return Scaling(self.magnitude.initial_O, self.magnitude.offset_O, norm_O)

    def refresh_norm(self) -> None:
        """Bring the norm up to date where that is a kernel's pass over the codes; as `NormCache.refresh`."""
        if self.update is not None and self.magnitude is not None:
            self._norms.refresh(self.update.factors)

    def replace_base(self, w_OI: torch.Tensor) -> None:
        """Give the frozen weight other values, in its format."""
        self.base.requantize(w_OI)
        self._norms.forget()

    def watch_stored(self) -> None:
        """Know a change of the factors by a write to the shards that are registered now."""
        if self.update is not None:
            self._norms.watch(list(self.update.parameters(recurse=False)))

    @torch.no_grad()
    def weight_norm(self) -> torch.Tensor:
        """||W + c BA|| of each row: (O,) at least float32, a constant."""
        return self._norms.norm(None if self.update is None else self.update.factors())

    @torch.no_grad()
    def merged(self, dtype: torch.dtype, onto: FrozenWeight | None = None) -> torch.Tensor:
        """s (W + c BA) as one (O, I) tensor of `dtype`, computed tile by tile in float32.

        Args:
            onto: another W to put the adapter on, the original 16-bit one for example.
        """
        weight = self.base
        if onto is not None:
            rest_OI = None if self.update is None else self.update.residual(onto)
            weight = onto if rest_OI is None else DenseWeight(rest_OI)
        factors = None if self.update is None else self.update.factors()
        combined = None if factors is None else factors.combined(weight.norm_dtype)
        scale_O = None
        if self.magnitude is not None:
            norms = self._norms if onto is None else NormCache(weight)
            scale_O = self.magnitude.value() / norms.norm(factors)
        merged_OI = torch.empty(self.out_features, self.in_features, dtype=dtype, device=weight.device)
        for rows, w_tile in weight.tiles(weight.norm_dtype):
            if factors is not None and combined is not None:
                a_RI, b_OR = combined
                w_tile = torch.addmm(w_tile, b_OR[rows], a_RI, alpha=factors.scale)
            merged_OI[rows] = w_tile if scale_O is None else w_tile * scale_O[rows, None]
        return merged_OI

    def merge(self, dtype: torch.dtype = torch.float32) -> None:
        """Compute with one dense weight, as fast as a plain layer, until `unmerge`.

        The stored weight stays beside it: a merged 4-bit layer takes the memory of both, and one
        without an adapter that of its dequantized copy.

        Args:
            dtype: of the merged copy; the output differs from the adapted layer's by its rounding.
        """
        self._merged = (DenseWeight(self.merged(dtype).flatten(1)),)

    def unmerge(self) -> None:
        """Compute with weight and adapter again; neither has changed in between."""
        self._merged = ()

    @torch.no_grad()
    def fold(self) -> None:
        """Generate by a kernel that reads the codes, s and s c B made once, until `unfold`.

        The sum is float32 and rounded once, as in the adapted product.  Nothing happens where the device has
        no such kernel for the format, or the adapter is switched off.
        """
        if not self.enabled:
            return
        factors = None if self.update is None else self.update.factors()
        scale_O = None if self.magnitude is None else self.magnitude.value() / self._norms.norm(factors)
        product = self.base.scaled_product(scale_O)
        if product is None:
            return
        combined = None if factors is None else factors.combined(self.base.norm_dtype)
        if combined is not None and scale_O is not None:
            combined = combined[0], combined[1] * scale_O[:, None]

        def folded(x_NI: torch.Tensor) -> torch.Tensor:
            wide_NI = x_NI.float()
            y_NO = product(wide_NI)
            if factors is not None and combined is not None:
                a_RI, b_OR = combined
                y_NO.addmm_(wide_NI @ a_RI.T, b_OR.T, alpha=factors.scale)
            return (y_NO if self.bias is None else y_NO + self.bias).to(x_NI.dtype)

        self._folded = folded

    def unfold(self) -> None:
        """Compute with weight and adapter again."""
        self._folded = None

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self._norms.forget()
        for weight in self._merged:
            weight._apply(fn)  # type: ignore[no-untyped-call]
        moved: Self = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return moved


class OutputLinear(nn.Linear):
    """A model's output layer without an adapter: `nn.Linear`, but a 16-bit weight takes wider inputs.

    It is widened tile by tile, as a frozen weight is; no copy of its size is made.  A submodule `token_rows`
    has rows that are trained.
    """

    adoptable = True
    """Its weight is a plain one, though `forward` is its own."""
    _widened: tuple[torch.Tensor, ...] = ()

    def widen(self, dtype: torch.dtype) -> None:
        """Compute with a copy of the weight in a dtype, until `narrow`; frozen weights only."""
        self._widened = (self.weight.detach().to(dtype),)

    def narrow(self) -> None:
        """Compute with the stored weight again."""
        self._widened = ()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., I) to (..., O), in the dtype of x."""
        # As rows: torch would make a batch of last tokens, which lie apart, and copy the weight for each.
        x_NI = x.reshape(-1, self.in_features)
        same = [w_OI for w_OI in (*self._widened, self.weight) if w_OI.dtype == x.dtype]
        if same:
            y_NO = F.linear(x_NI, same[0], self.bias)
        else:
            y_NO = adapted_product(x_NI, DenseWeight(self.weight), bias_O=self.bias)
        rows: Any = self._modules.get("token_rows")
        if rows is not None:
            rows.replace_logits(x_NI, y_NO, self.bias)
        return y_NO.view(*x.shape[:-1], self.out_features)


def refuse_large_rank(config: AdapterConfig, name: str, shape: tuple[int, int]) -> None:
    """A rank above the smaller side of the layer gains nothing over a full matrix.

    Raises: InputError: naming the layer, its shape and the largest rank.
    """
    kind = UPDATES[config.type]
    largest = None if kind is None else kind.largest_rank(shape)
    if largest is not None and config.r > largest:
        raise InputError(
            f"adapter.r is {config.r}, larger than the smaller side of {name} ({shape[0]}x{shape[1]}); "
            f"allowed: 1 to {largest}"
        )
