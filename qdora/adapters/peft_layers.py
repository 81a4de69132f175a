"""PEFT's DoRA layers, computed by our product with PEFT's own parameters and bytes.

PEFT computes W x before it asks the variant of a layer, so that with a variant of ours W would be multiplied
twice.  An accelerated layer is of a subclass of PEFT's instead: its `forward` is ours where it can be, and
PEFT's own where adapters are off, merged, mixed in a batch or several at once.  All else is inherited, and
parameters and modules stay where they are.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import Linear4bit
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import nn
from torch.distributed.tensor import DTensor

from qdora.adapters.base import Factors
from qdora.adapters.magnitude import NormCache
from qdora.adapters.product import Scaling, adapted_product
from qdora.adapters.tiles import has_native_bfloat16
from qdora.errors import InputError
from qdora.quant.base import FrozenWeight
from qdora.quant.dense import DenseWeight
from qdora.quant.stored import adopt_linear


class _Norms(NamedTuple):
    """The norm of one adapter, as long as its factors are these parameters."""

    a_RI: torch.Tensor
    b_OR: torch.Tensor
    cache: NormCache


class Acceleration:
    """What an accelerated layer keeps beside PEFT's modules; nothing of it is saved or copied.

    Args:
        name: of the layer.
        dropout_placement: as in `AdapterConfig`.
        said: what has been said about the model, of which its layers share the list.
    """

    def __init__(self, name: str, dropout_placement: str, said: list[str]) -> None:
        self.name, self.dropout_placement, self.said = name, dropout_placement, said
        self._weight: FrozenWeight | None = None
        self._source: tuple[Any, ...] = ()
        self._norms: dict[str, _Norms] = {}
        self._zeros_O: torch.Tensor | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Acceleration, (self.name, self.dropout_placement, self.said)

    def forget(self) -> None:
        """The base weight has changed, or an adapter in a way that leaves no trace."""
        self._weight, self._source = None, ()
        self._norms.clear()

    def weight(self, base: nn.Linear) -> FrozenWeight:
        """The base weight; adopted again where it is not the one that it was, as after a merge or a move."""
        weight: Any = base.weight
        state = getattr(weight, "quant_state", None)
        if state is None and _is_4bit(base):
            raise InputError(
                f"{self.name}: its 4-bit weight has no quant_state, which FSDP takes from it, and PEFT "
                f"cannot compute it either; allowed with FSDP: unquantized base weights, or `qdora train`"
            )
        absmax = None if state is None else state.absmax.data_ptr()
        packed = getattr(state, "packing_format_for_cpu", False)
        source = (id(weight), weight.data_ptr(), weight._version, id(state), absmax, packed)
        if self._weight is None or source != self._source:
            self.forget()
            self._weight = adopt_linear(base, self.name) or DenseWeight(base.weight)
            if packed:  # bitsandbytes has unpacked it to be read
                return self.weight(base)
            self._source = source
        return self._weight

    def norms(self, adapter: str, weight: FrozenWeight, factors: Factors) -> NormCache:
        """The norm of an adapter."""
        known = self._norms.get(adapter)
        if known is None or known.a_RI is not factors.a_RI or known.b_OR is not factors.b_OR:
            known = self._norms[adapter] = _Norms(factors.a_RI, factors.b_OR, NormCache(weight))
        return known.cache

    def forget_norms(self) -> None:
        """They are computed again."""
        self._norms.clear()

    def zeros(self, weight: FrozenWeight) -> torch.Tensor:
        """(O,) the frozen part of a magnitude that is trained as it is."""
        zeros_O, dtype, device = self._zeros_O, weight.norm_dtype, weight.device
        if zeros_O is None or zeros_O.device != device or zeros_O.dtype != dtype:
            zeros_O = self._zeros_O = torch.zeros(weight.out_features, dtype=dtype, device=device)
        return zeros_O


class OffsetMagnitude(DoraLinearLayer):
    """PEFT's magnitude as m = initial + offset, of which the offset is trained; saved and loaded as m.

    Attributes:
        offset: (O,) parameter, 16 bits around 0 are fine enough to learn in.
        initial_O: (O,) frozen float32.
    """

    offset: nn.Parameter
    initial_O: torch.Tensor

    @classmethod
    def convert(cls, module: nn.Module) -> None:
        """Make a PEFT magnitude one with an offset, in place."""
        m_O: nn.Parameter = module._parameters.pop("weight")  # type: ignore[assignment]
        module.__class__ = cls
        module.register_buffer("initial_O", m_O.detach().to(_wide(m_O.dtype)), persistent=False)
        module.register_parameter("offset", nn.Parameter(torch.zeros_like(m_O), m_O.requires_grad))

    def revert(self, dtype: torch.dtype) -> None:
        """Make it PEFT's again, m rounded to a dtype."""
        m_O, trained = self.weight.detach().to(dtype), self.offset.requires_grad
        del self._parameters["offset"], self._buffers["initial_O"]
        self._non_persistent_buffers_set.discard("initial_O")
        self.__class__ = DoraLinearLayer  # type: ignore[assignment]
        self.register_parameter("weight", nn.Parameter(m_O, trained))

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """m: (O,) at least float32."""
        return self.initial_O + self.offset.to(self.initial_O.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        wide_O = self.initial_O
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.initial_O.dtype.itemsize < wide_O.dtype.itemsize:  # of a model that is cast to 16 bits
            self.initial_O = wide_O.to(self.initial_O.device)
        return self

    @torch.no_grad()
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight.detach()

    @torch.no_grad()
    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        m_O = state_dict.get(prefix + "weight")
        if m_O is None:
            args[2].append(prefix + "weight")  # the missing keys
        elif m_O.shape != self.initial_O.shape:
            args[4].append(f"{prefix}weight: {tuple(m_O.shape)}, this one has {tuple(self.initial_O.shape)}")
        else:
            self.initial_O.copy_(m_O)
            self.offset.zero_()


class _Accelerated:
    """What an accelerated layer does in place of its PEFT class."""

    qdora: Acceleration

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As PEFT's; by our product where this layer and this call allow it."""
        # A graph would keep what is asked for in every pass here: PEFT's own compiles as it is.
        own = args or kwargs or torch.compiler.is_compiling()
        adapter = None if own else single_adapter(self)
        if adapter is None or why_left(self, adapter, x) is not None:
            result: torch.Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return result
        return _forward(self, self.qdora, adapter, x)

    def merge(self: Any, *args: Any, **kwargs: Any) -> None:
        """As PEFT's, which writes to the base weight without a trace."""
        super().merge(*args, **kwargs)  # type: ignore[misc]
        self.qdora.forget()

    def unmerge(self: Any) -> None:
        """As PEFT's."""
        super().unmerge()  # type: ignore[misc]
        self.qdora.forget()

    def train(self: Any, mode: bool = True) -> Any:
        """As PEFT's; a norm does not outlive a change of mode."""
        if mode != self.training:
            self.qdora.forget_norms()
        return super().train(mode)  # type: ignore[misc]


class AcceleratedLinear(_Accelerated, LoraLinear):
    """PEFT's layer on a dense `nn.Linear`."""


class AcceleratedLinear4bit(_Accelerated, Linear4bit):  # type: ignore[misc]
    """PEFT's layer on a 4-bit layer of bitsandbytes."""


ACCELERATED = {LoraLinear: AcceleratedLinear, Linear4bit: AcceleratedLinear4bit}
"""The class of each kind of layer of PEFT's that can be accelerated."""


def single_adapter(layer: Any) -> str | None:
    """The adapter that a layer applies, where it applies one and its base weight is its own."""
    if layer.disable_adapters or layer.merged_adapters:
        return None
    factors = layer.lora_A
    active = [name for name in layer.active_adapters if name in factors]
    return active[0] if len(active) == 1 else None


def why_left(layer: Any, adapter: str, x: torch.Tensor | None = None) -> str | None:
    """Why PEFT computes a layer of a class in `ACCELERATED`; None where our product can.

    Asked for in every pass, since hooks, wrappers and what is trained may come and go.

    Args:
        x: the input of a pass.
    """
    if type(layer.lora_variant.get(adapter)) is not DoraLinearVariant:
        return "its adapter is no DoRA, or has another variant beside it"
    base, a, b = layer.base_layer, layer.lora_A[adapter], layer.lora_B[adapter]
    if getattr(layer, "fan_in_fan_out", False):
        return "its weight is stored as (in, out)"
    if layer.ephemeral_gpu_offload:
        return "ephemeral_gpu_offload moves its weight in every pass"
    if type(a) is not nn.Linear or type(b) is not nn.Linear:
        return "its factors are wrapped by another module"
    if b.bias is not None:
        return "lora_bias: the update has a bias, which the magnitude would scale"
    if any(m._forward_hooks or m._forward_pre_hooks for m in (base, a, b)):
        return "hooks hang on its base layer or its factors, which our product would not call"
    if "forward" in vars(base) and getattr(getattr(base, "_hf_hook", None), "offload", True):
        return "the forward pass of its base layer has been replaced, as accelerate does to offload weights"
    weight = base.weight
    if x is not None and (x.device != weight.device or not x.is_floating_point()):
        return "its input is on another device, or no floating point"
    if weight.requires_grad:
        return "its base weight is trained"
    if weight.is_meta:
        return "its base weight is offloaded"
    if any(isinstance(t, DTensor) or t.dim() != 2 for t in (weight, a.weight, b.weight)):
        return "its parameters are sharded"
    return None


def computes_in_float32(device: torch.device) -> bool:
    """Whether float32 adapters are computed in float32 also where PEFT multiplies W in 16 bits.

    On a CPU, whose products of float32 tensors can round their operands alone: W x and its sum with the
    update stay unrounded, and it is as fast.  In 16 bits the gradients would be no nearer to float64 than
    PEFT's, which computes all but W x in float32.
    """
    return device.type == "cpu"


def _forward(layer: Any, acceleration: Acceleration, adapter: str, x: torch.Tensor) -> torch.Tensor:
    base, magnitude = layer.base_layer, layer.lora_magnitude_vector[adapter]
    m_O = magnitude.offset if isinstance(magnitude, OffsetMagnitude) else magnitude.weight
    a_RI, b_OR = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    dtype, out_dtype = _dtypes(base, x, m_O.dtype)
    bf16_operands = False
    if computes_in_float32(x.device):
        wide = torch.promote_types(dtype, a_RI.dtype)
        widened = dtype == torch.bfloat16 and wide == torch.float32
        bf16_operands = widened and has_native_bfloat16(x.device)
        dtype = wide
    # The product casts by itself, and keeps its small sums in float32.
    with torch.autocast(x.device.type, enabled=False):
        weight = acceleration.weight(base)
        factors = Factors(a_RI, b_OR, None, None, layer.scaling[adapter])
        if isinstance(magnitude, OffsetMagnitude):
            initial_O = magnitude.initial_O
        else:
            initial_O = acceleration.zeros(weight)
            if layer.training and m_O.dtype.itemsize < 4 and m_O.requires_grad and not acceleration.said:
                acceleration.said.append(frozen_sentence([m_O]))
                warnings.warn(acceleration.said[0], stacklevel=2)
        x_NI = x.reshape(-1, x.shape[-1]).to(dtype)
        dropout, p, rest_NI = layer.lora_dropout[adapter], 0.0, None
        if layer.training and not isinstance(dropout, nn.Identity):
            if acceleration.dropout_placement == "branch":
                p = dropout.p
            else:
                kept_NI = dropout(x_NI)
                x_NI, rest_NI = kept_NI, x_NI - kept_NI
        norm_O = acceleration.norms(adapter, weight, factors).for_product(factors, x_NI)
        y_NO = adapted_product(
            x_NI,
            weight,
            factors=factors,
            scaling=Scaling(initial_O, m_O, norm_O),
            bias_O=base.bias,
            dropout=p,
            bf16_operands=bf16_operands,
        )
        if rest_NI is not None:
            # W x + (s - 1) W drop(x) + s c B A drop(x)  =  s (W + c BA) drop(x) + W (x - drop(x))
            y_NO = y_NO + adapted_product(rest_NI, weight, bf16_operands=bf16_operands)
        return y_NO.view(*x.shape[:-1], weight.out_features).to(out_dtype)


def _dtypes(base: Any, x: torch.Tensor, magnitude: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    """In what PEFT's layer computes the base product, and what it returns."""
    device = x.device.type
    four_bit = _is_4bit(base)
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        return dtype, torch.promote_types(x.dtype, magnitude) if four_bit else dtype
    if not four_bit:
        return x.dtype, x.dtype
    if not base.compute_type_is_set:
        base.set_compute_type(x)
        base.compute_type_is_set = True
    return base.compute_dtype or x.dtype, x.dtype


def _is_4bit(base: nn.Module) -> bool:
    """Whether a layer is bitsandbytes' for 4 bits, whatever has become of its weight."""
    return hasattr(base, "compute_dtype")


def frozen_sentence(magnitudes: Sequence[torch.Tensor]) -> str:
    """That these trained magnitudes do not learn in 16 bits, with the numbers of the first."""
    m, info = float(magnitudes[0].detach().abs().median()), torch.finfo(magnitudes[0].dtype)
    spacing = info.eps * 2.0 ** math.floor(math.log2(max(m, info.tiny)))
    what = "a trained magnitude is" if len(magnitudes) == 1 else f"{len(magnitudes)} trained magnitudes are"
    return (
        f"{what} stored in {info.dtype}, which near {m:.2g} has a spacing of {spacing:.1g}: smaller steps of "
        f"an optimizer without float32 masters round away; qdora.accelerate(model, magnitude='float32'), or "
        f"'offset', keeps them"
    )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
