"""The one layer of all methods: a weight, an optional direction, an optional magnitude."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from torch.nn import functional as F

from qdora.adapters.direction import LowRank, SharedPair, Vera
from qdora.adapters.magnitude import Magnitude
from qdora.adapters.methods import METHODS
from qdora.adapters.norm_cache import NormCache
from qdora.adapters.product import Scaling, adapted_product
from qdora.adapters.update import Update
from qdora.config import AdapterConfig, BaseKind
from qdora.errors import InputError
from qdora.quant.dense import DenseWeight
from qdora.quant.nf4 import NF4Weight
from qdora.quant.weight import FrozenWeight

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class AdaptedLinear(nn.Module):
    """y = s ∘ (W x + c B A drop(x)) + bias,  s = m / ||W + c BA||_row  (1 without a magnitude).

    The norm is a constant in backward (DoRA, arXiv:2402.09353 §4.3) unless its exact gradient
    is asked for.  It is computed when a factor has changed, from a product that rides along with the
    forward pass, and used again until one changes.

    Attributes:
        base: the (O, I) weight; frozen but for full fine-tuning.
        bias: (O,) or None; the magnitude does not scale it.
        direction, magnitude: the adapter; None where the method has none.
        enabled: False computes the base alone; the adapter stays as it is.
        exact_norm_gradient: differentiate the norm.
        published_dropout: also drop the inputs of (s - 1) W x, as the published code does.
    """

    base: nn.Module
    direction: LowRank | Vera | None
    magnitude: Magnitude | None

    def __init__(self, weight: FrozenWeight, bias_O: torch.Tensor | None = None) -> None:
        super().__init__()
        assert isinstance(weight, nn.Module)
        self.base = weight
        self.bias = None if bias_O is None else nn.Parameter(bias_O.detach(), requires_grad=False)
        self.direction = self.magnitude = None
        self.enabled = True
        self.exact_norm_gradient = self.published_dropout = False
        self._norms = NormCache(weight)
        # In a tuple, so that it is no submodule: a merged copy is not part of the model's state.
        self._merged: tuple[DenseWeight, ...] = ()

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: AdapterConfig, *, seed: int = 0) -> AdaptedLinear:
        """Adapt one linear layer: quantize its weight where the method says so, add the adapter.

        Args:
            linear: its weight is taken over, not copied, where it stays dense.
            config: the method, rank and scale; its targets and patterns are not looked at.
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
        """The weight, as something that gives tiles."""
        return cast(FrozenWeight, self.base)

    @property
    def in_features(self) -> int:
        """I."""
        return self.weight_source.in_features

    @property
    def out_features(self) -> int:
        """O."""
        return self.weight_source.out_features

    @property
    def has_adapter(self) -> bool:
        """Whether there is a direction or a magnitude."""
        return self.direction is not None or self.magnitude is not None

    @property
    def is_merged(self) -> bool:
        """Whether the adapter is merged into a copy of the weight."""
        return bool(self._merged)

    def add_adapter(
        self,
        config: AdapterConfig,
        *,
        direction: bool | None = None,
        magnitude: bool | None = None,
        seed: int = 0,
        pair: SharedPair | None = None,
    ) -> None:
        """Give the layer a fresh adapter; its output does not change yet.

        Args:
            direction, magnitude: whether to have them; as the method says where None.
            seed: of A, or of VeRA's pair where none is given.
            pair: VeRA's, shared with other layers; one of this layer's own where None.
        Raises: InputError: r is larger than a side of the layer.
        """
        spec = METHODS[config.method]
        device, dtype = self.weight_source.device, DTYPES[config.dtype]
        shape = (self.in_features, self.out_features)
        self.exact_norm_gradient = config.norm_gradient == "exact"
        self.published_dropout = config.dropout_placement == "published"
        if direction is False:
            pass
        elif spec.direction == "lora":
            refuse_large_rank(config.r, "this layer", self.out_features, self.in_features)
            self.direction = LowRank(
                *shape,
                config.r,
                scale=config.scale,
                dropout=config.dropout,
                dtype=dtype,
                device=device,
                seed=seed,
            )
        elif spec.direction == "vera":
            pair = pair or SharedPair(config.r, *shape, seed=seed, device=device)
            self.direction = Vera(pair, *shape, dropout=config.dropout, dtype=dtype)
        if spec.magnitude if magnitude is None else magnitude:
            self.magnitude = Magnitude(self._norms.norm(None), dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer.

        Args:
            x: (..., I), compute dtype.
        Returns: (..., O), dtype of x.
        """
        x_NI = x.reshape(-1, self.in_features)
        y_NO = self._adapted(x_NI) if self.enabled and not self.is_merged else self._plain(x_NI)
        return y_NO.view(*x.shape[:-1], self.out_features)

    def _adapted(self, x_NI: torch.Tensor) -> torch.Tensor:
        direction = self.direction
        update = None if direction is None else direction.update()
        dropout = direction.dropout if direction is not None and self.training else 0.0
        around_NI = None
        if dropout and self.published_dropout and self.magnitude is not None:
            kept_NI = F.dropout(x_NI, dropout)
            x_NI, around_NI, dropout = kept_NI, x_NI - kept_NI, 0.0
        y_NO = adapted_product(
            x_NI,
            self.weight_source,
            update=update,
            scaling=self._scaling(update),
            bias_O=self.bias,
            trained_OI=self._trained_weight(),
            dropout=dropout,
        )
        # W x + (s - 1) W drop(x) + s c B A drop(x)  =  s (W + c BA) drop(x) + W (x - drop(x))
        return y_NO if around_NI is None else y_NO + adapted_product(around_NI, self.weight_source)

    def _plain(self, x_NI: torch.Tensor) -> torch.Tensor:
        if self.is_merged and self.enabled and self.training and torch.is_grad_enabled():
            raise RuntimeError("a merged adapter gets no gradient: unmerge before training")
        weight = self._merged[0] if self.is_merged and self.enabled else self.weight_source
        return adapted_product(x_NI, weight, bias_O=self.bias)

    def _scaling(self, update: Update | None) -> Scaling | None:
        if self.magnitude is None:
            return None
        magnitude, norms = self.magnitude, self._norms
        if update is None or (norms.is_fresh(update) and not self.exact_norm_gradient):
            return Scaling(magnitude.initial_O, magnitude.offset_O, norms.norm(update))
        if self.exact_norm_gradient:
            return Scaling(magnitude.initial_O, magnitude.offset_O, norms.differentiable_norm(update))
        return Scaling(magnitude.initial_O, magnitude.offset_O, lambda wa_OR: norms.remember(update, wa_OR))

    def _trained_weight(self) -> torch.Tensor | None:
        trained = isinstance(self.base, DenseWeight) and self.base.weight.requires_grad
        return self.base.weight if trained and isinstance(self.base, DenseWeight) else None

    @torch.no_grad()
    def start_norms(self) -> None:
        """Compute ||W||, and start the magnitude from it: what `add_adapter` could not do on the meta device.

        W must be whole, and so must the adapter be: that of a fresh start.
        """
        self._norms.forget()
        if self.magnitude is not None:
            self.magnitude.start_from(self._norms.norm(None))

    def watch_stored(self) -> None:
        """Know a change of the factors by a write to the shards that are registered now."""
        if self.direction is not None:
            self._norms.watch(list(self.direction.parameters(recurse=False)))

    @torch.no_grad()
    def weight_norm(self) -> torch.Tensor:
        """||W + c BA|| of each row: (O,) at least float32, a constant."""
        return self._norms.norm(None if self.direction is None else self.direction.update())

    @torch.no_grad()
    def merged(self, dtype: torch.dtype, onto: FrozenWeight | None = None) -> torch.Tensor:
        """s (W + c BA) as one (O, I) tensor of `dtype`, computed tile by tile in float32.

        Args:
            onto: another W to put the adapter on, the original 16-bit one for example.
        """
        weight = self.weight_source if onto is None else onto
        update = None if self.direction is None else self.direction.update()
        factors = None if update is None else update.factors(weight.norm_dtype)
        scale_O = None if self.magnitude is None else self._merged_scale(weight, update, self.magnitude)
        merged_OI = torch.empty(self.out_features, self.in_features, dtype=dtype, device=weight.device)
        for rows, w_tile in weight.tiles(weight.norm_dtype):
            if update is not None and factors is not None:
                a_RI, b_OR = factors
                w_tile = torch.addmm(w_tile, b_OR[rows], a_RI, alpha=update.scale)
            merged_OI[rows] = w_tile if scale_O is None else w_tile * scale_O[rows, None]
        return merged_OI

    def _merged_scale(
        self, weight: FrozenWeight, update: Update | None, magnitude: Magnitude
    ) -> torch.Tensor:
        norms = self._norms if weight is self.weight_source else NormCache(weight)
        return magnitude.value() / norms.norm(update)

    def merge(self, dtype: torch.dtype = torch.float32) -> None:
        """Compute with one dense weight, as fast as a plain layer, until `unmerge`.

        The stored weight stays beside it: a merged 4-bit layer takes the memory of both.

        Args:
            dtype: of the merged copy; the output differs from the adapted layer's by its rounding.
        """
        if self.has_adapter:
            self._merged = (DenseWeight(self.merged(dtype)),)

    def unmerge(self) -> None:
        """Compute with weight and adapter again; neither has changed in between."""
        self._merged = ()

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        self._norms.forget()
        for weight in self._merged:
            weight._apply(fn)  # type: ignore[no-untyped-call]
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
