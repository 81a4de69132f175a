"""The low-rank update of a weight: what every variant provides, and its parameters in and out of shards."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from qdora.config import AdapterConfig, UpdateType
from qdora.errors import InputError
from qdora.quant.base import FrozenWeight, Shard


def describe(quantization: str, adapter: AdapterConfig, mode: str = "adapter") -> str:
    """What a run trains, by its axes: `nf4 + lora + dora`, `none + vera`, `full`."""
    if mode == "full":
        return "full"
    update = [] if adapter.type == "none" else [adapter.type]
    magnitude = "frozen magnitude" if adapter.magnitude == "frozen" else "dora"
    return " + ".join([quantization, *update, *([magnitude] if adapter.dora else [])])


DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class Factors(NamedTuple):
    """The factors of c diag(outer) B diag(inner) A, differentiable in those that are trained.

    Attributes:
        a_RI, b_OR: the matrices.
        inner_R, outer_O: VeRA's vectors d and b; a gate as a vector `outer_O` of one number; None for ones.
        scale: c.
        watched: what is written to when a factor changes, where that is not the factors themselves.
    """

    a_RI: torch.Tensor
    b_OR: torch.Tensor
    inner_R: torch.Tensor | None
    outer_O: torch.Tensor | None
    scale: float
    watched: tuple[torch.Tensor, ...] | None = None

    def combined(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """diag(inner) A (R, I) and diag(outer) B (O, R) in `dtype`; their gradients come back unrounded."""
        a_RI, b_OR = widened(self.a_RI, dtype), widened(self.b_OR, dtype)
        if self.inner_R is not None:
            a_RI = a_RI * widened(self.inner_R, dtype)[:, None]
        if self.outer_O is not None:
            b_OR = b_OR * widened(self.outer_O, dtype)[:, None]
        return a_RI, b_OR

    def tensors(self) -> Sequence[torch.Tensor]:
        """The tensors whose versions say whether a factor has changed."""
        if self.watched is not None:
            return self.watched
        return [t for t in (self.a_RI, self.b_OR, self.inner_R, self.outer_O) if t is not None]


class AdapterModule(nn.Module, ABC):
    """A module of trained parameters that knows the initial value of each.

    Attributes:
        storage: dtype of the parameters where they are not sharded; their shards are float32 masters.
    """

    storage: torch.dtype

    @abstractmethod
    def initial(self, name: str) -> torch.Tensor:
        """The full initial value of a parameter, on the CPU."""

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Write the initial values; parameters on the meta device stay there."""
        for name, parameter in self.named_parameters(recurse=False):
            if not parameter.is_meta:
                assign_full(parameter, self.initial(name), self.storage)


class SharedBuffers(nn.Module, ABC):
    """Frozen tensors that the updates of all layers share, as buffers; drawn from a seed."""

    @abstractmethod
    def materialize(self, device: torch.device | None) -> None:
        """Give buffers on the meta device their values, on a device."""

    @property
    def is_meta(self) -> bool:
        """Whether they have no values yet."""
        return any(buffer.is_meta for buffer in self.buffers())


class LowRankUpdate(AdapterModule):
    """One layer's low-rank update; a variant is a subclass in a file of its own and a row of the registry.

    Attributes:
        kind: name of the variant, as in `adapter.type`.
        peft_type: PEFT's name of it.
        peft_keys: what PEFT calls each parameter, after the layer's name.
        peft_magnitude: whether PEFT has this update with a magnitude.
        extra_keys: tensors of a layer that PEFT does not know; a file with them is not for PEFT.
        shared_keys: full names of tensors that all layers share, where a file has them.
        scale: the factor c before B A.
        dropout: probability of dropping an input of this branch, in training.
        seed: of this layer's random values.
    """

    kind: ClassVar[UpdateType]
    peft_type: ClassVar[str]
    peft_keys: ClassVar[Mapping[str, str]]
    peft_magnitude: ClassVar[bool] = False
    extra_keys: ClassVar[tuple[str, ...]] = ()
    shared_keys: ClassVar[tuple[str, ...]] = ()
    scale: float
    dropout: float
    seed: int

    def __init__(
        self,
        shape: tuple[int, int],
        config: AdapterConfig,
        device: torch.device,
        seed: int,
        shared: Any = None,
    ) -> None:
        """The update of one layer, at its initial values.

        Args:
            shape: (out, in) of the layer.
            config: rank, scale, dropout, dtype and start of this layer.
            seed: of this layer's random values.
            shared: what `create_shared` made for all layers; None for a layer by itself.
        """
        super().__init__()
        self.scale, self.dropout, self.storage = config.scale, config.dropout, DTYPES[config.dtype]
        self.seed = seed
        if shared is None:
            shared = self.create_shared([shape], config, device, seed)
        self.create_parameters(shape, config, device, shared)
        self.reset_parameters()

    @abstractmethod
    def create_parameters(
        self, shape: tuple[int, int], config: AdapterConfig, device: torch.device, shared: Any
    ) -> None:
        """Register the parameters, of dtype `storage`, without values; arguments as of the class."""

    @classmethod
    def create_shared(
        cls, shapes: Sequence[tuple[int, int]], config: AdapterConfig, device: torch.device, seed: int
    ) -> Any:
        """What all layers of a model have in common; None where they have nothing.

        Args:
            shapes: (out, in) of every layer.
        """
        return None

    @classmethod
    def largest_rank(cls, shape: tuple[int, int]) -> int | None:
        """The largest rank that makes sense for a layer; None for any."""
        return None

    @property
    @abstractmethod
    def r(self) -> int:
        """Rank."""

    @abstractmethod
    def factors(self) -> Factors:
        """The factors of the update, differentiable."""

    def reset_from_weight(self, weight: FrozenWeight) -> torch.Tensor | None:
        """Start from the weight itself, where the variant's start does that.

        Returns: (out, in) what the frozen weight becomes, so that the sum with the update stays what it was;
            None where the start does not look at the weight.
        """
        return None

    def initial_values(self) -> dict[str, torch.Tensor]:
        """What a fresh update follows from, by name; of the seed and the shapes alone."""
        return {name: self.initial(name) for name, _ in self.named_parameters(recurse=False)}

    @property
    def sees_weight(self) -> bool:
        """Whether `reset_from_weight` does anything."""
        return False

    @classmethod
    @abstractmethod
    def peft_settings(cls, updates: Mapping[str, Self]) -> dict[str, Any]:
        """PEFT's settings for these layers' updates, by layer name."""

    @classmethod
    @abstractmethod
    def config_from_peft(cls, settings: Mapping[str, Any], layers: Sequence[str]) -> dict[str, Any]:
        """Settings of an `AdapterConfig` from PEFT's; inverse of `peft_settings`.

        Raises: KeyError, TypeError, ValueError: a setting is missing or cannot be used.
        """

    @classmethod
    @abstractmethod
    def saved_shapes(cls, shape: tuple[int, int], r: int) -> dict[str, tuple[int, ...]]:
        """Shape of each saved tensor of a layer of (out, in), by its key."""

    @classmethod
    def seed_from_peft(cls, settings: Mapping[str, Any]) -> int:
        """The seed of `create_shared`, where PEFT's settings have one."""
        return 0

    def extra_tensors(self) -> dict[str, torch.Tensor]:
        """What a file needs beside the parameters, by `extra_keys`."""
        return {}

    def load_extra(
        self, tensors: Mapping[str, torch.Tensor], settings: Mapping[str, Any], weight: FrozenWeight
    ) -> None:
        """Take back what `extra_tensors` gave.

        Args:
            tensors: of this layer, by PEFT's keys and `extra_keys`.
            settings: PEFT's.
            weight: that the adapter is loaded onto.
        """

    def residual(self, weight: FrozenWeight) -> torch.Tensor | None:
        """A weight without what the update took over at its start: the frozen weight beside it.

        Returns: (out, in); None where the weight stays what it is.
        """
        return None

    def subtracted_factors(self) -> Factors | None:
        """What the update was when `residual` took it out of the weight: with it that weight is step 0's.

        Returns: None where the weight stays what it is.
        """
        return None

    @classmethod
    def derives_base(cls, settings: Mapping[str, Any], quantization: str | None = None) -> bool:
        """Whether a file of PEFT's means another base weight, that is made of the one at hand.

        Args:
            settings: PEFT's.
            quantization: format of that weight; not looked at where None.
        Raises: ValueError: it cannot be made of a weight in that format.
        """
        return False

    @classmethod
    def shared_tensors(cls, updates: Mapping[str, Self]) -> dict[str, torch.Tensor]:
        """What a file needs once for all layers, by `shared_keys`."""
        return {}

    @classmethod
    def load_shared(cls, updates: Mapping[str, Self], tensors: Mapping[str, torch.Tensor]) -> None:
        """Take back what `shared_tensors` gave; nothing where a file has none.

        Raises: ValueError: a tensor is missing or of another shape.
        """


class _Widened(torch.autograd.Function):
    """A parameter in a wider dtype, whose gradient comes back unrounded; see `widened`."""

    @staticmethod
    def forward(ctx: Any, stored: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return stored.to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


def widened(stored: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`stored.to(dtype)`, but the gradient keeps `dtype`; `Tensor.to` would round it back."""
    if stored.dtype == dtype:
        return stored
    if not torch.is_grad_enabled():
        return stored.to(dtype)
    result: torch.Tensor = _Widened.apply(stored, dtype)  # type: ignore[no-untyped-call]
    return result


def adapter_parameter(value: torch.Tensor) -> nn.Parameter:
    """A trained parameter whose gradient is held and summed in at least float32.

    Micro-batch gradients added up in bfloat16 lose the small ones.
    """
    parameter = nn.Parameter(value)
    parameter.grad_dtype = torch.promote_types(value.dtype, torch.float32)
    return parameter


def full_tensor(parameter: torch.Tensor, storage: torch.dtype) -> torch.Tensor:
    """All rows, rounded to the storage dtype; a collective where the parameter is sharded.

    Under FSDP a trained parameter is a float32 shard, the optimizer's master; what computes, and what is
    saved, is its rounding.
    """
    stored = parameter.detach()
    if isinstance(stored, DTensor):
        stored = stored.full_tensor()
    return stored.to(storage)


def refuse_non_finite(tensors: Mapping[str, torch.Tensor], where: str) -> None:
    """Raises: InputError: a value is NaN or infinite; `where` and the tensor are named."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        extremes = torch.stack(tensor.aminmax())  # NaN where there is one; needs no memory, as isfinite does
        if not extremes.isfinite().all():
            kind = "NaN" if extremes.isnan().any() else "infinite values"
            raise InputError(
                f"{where}: tensor {name} holds {kind}: its training diverged, or the file is damaged"
            )


@torch.no_grad()
def assign_full(parameter: torch.Tensor, value: torch.Tensor, storage: torch.dtype) -> None:
    """Write a full value, rounded to the storage dtype, into a parameter or into this rank's shard of it.

    Args:
        value: shape of the full parameter, any dtype and device.
    """
    rounded = value.to(storage)
    if isinstance(parameter, DTensor):
        parameter.to_local().copy_(local_rows_of(parameter, rounded))
        torch.autograd.graph.increment_version(parameter)
    else:
        parameter.copy_(rounded)


def local_rows_of(parameter: DTensor, value: torch.Tensor) -> torch.Tensor:
    """The rows of a full value that belong to this rank's shard."""
    mesh = parameter.device_mesh
    return value[Shard(mesh.get_local_rank(), mesh.size()).rows(value.shape[0])]
