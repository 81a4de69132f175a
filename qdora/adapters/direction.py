"""The low-rank direction of an adapted layer: what is trained of c diag(b) B diag(d) A."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import nn

from qdora.adapters.update import Update
from qdora.adapters.whole import put

D_INITIAL = 0.1
"""Start of VeRA's d (arXiv:2310.11454 §3.1)."""


class LowRank(nn.Module):
    """LoRA: A and B are trained (arXiv:2106.09685 §4.1).

    Attributes:
        a_RI: (R, I) parameter, Kaiming-uniform.
        b_OR: (O, R) parameter, zero.
        scale: the factor before BA.
        dropout: probability of dropping an input of this branch, in training.
        storage: dtype of the parameters where they are whole; their shards are float32.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        *,
        scale: float,
        dropout: float = 0.0,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.scale, self.dropout, self.storage, self._seed = scale, dropout, dtype, seed
        self.a_RI = adapter_parameter(torch.empty(r, in_features, dtype=dtype, device=device))
        self.b_OR = adapter_parameter(torch.empty(out_features, r, dtype=dtype, device=device))
        start(self)

    @property
    def r(self) -> int:
        """Rank."""
        return self.a_RI.shape[0]

    def initial(self, name: str) -> torch.Tensor:
        """Where a parameter starts, as a whole, on the CPU."""
        if name == "a_RI":
            return kaiming_a(self.a_RI.shape[0], self.a_RI.shape[1], self._seed)
        return torch.zeros(self.b_OR.shape)

    def update(self) -> Update:
        """The update that the factors make."""
        return Update(self.a_RI, self.b_OR, None, None, self.scale)

    def extra_repr(self) -> str:
        return f"r={self.r}, scale={self.scale:g}, dropout={self.dropout:g}, {self.a_RI.dtype}"


class SharedPair(nn.Module):
    """VeRA's frozen random matrices, one pair for all layers of a model (arXiv:2310.11454 §3.1).

    Drawn from a seed, A before B, as PEFT draws them: a file needs the seed alone.

    Attributes:
        a_RI: (R, largest I) float32, Kaiming-uniform in ±sqrt(6/I); a layer takes its first columns.
        b_OR: (largest O, R) float32, Kaiming-uniform in ±sqrt(6/R); a layer takes its first rows.
        seed: from which they were drawn; None where a file gave others.
    """

    a_RI: torch.Tensor
    b_OR: torch.Tensor

    def __init__(
        self, r: int, in_features: int, out_features: int, *, seed: int, device: torch.device | None = None
    ) -> None:
        super().__init__()
        self.seed: int | None = seed
        self.register_buffer("a_RI", torch.empty(r, in_features, device="meta"), persistent=False)
        self.register_buffer("b_OR", torch.empty(out_features, r, device="meta"), persistent=False)
        if device is None or device.type != "meta":
            self.draw(device)

    def draw(self, device: torch.device | None) -> None:
        """Make the matrices that the seed gives, on a device."""
        assert self.seed is not None
        generator = torch.Generator().manual_seed(self.seed)
        for name in ("a_RI", "b_OR"):
            shape = getattr(self, name).shape
            bound = math.sqrt(3) * (math.sqrt(2) / math.sqrt(shape[1]))
            drawn = torch.empty(shape).uniform_(-bound, bound, generator=generator)
            setattr(self, name, drawn.to(device))

    def extra_repr(self) -> str:
        return f"A {tuple(self.a_RI.shape)}, B {tuple(self.b_OR.shape)}, seed {self.seed}"


class Vera(nn.Module):
    """VeRA: vectors d and b are trained around a frozen pair (arXiv:2310.11454 §3.1).

    Attributes:
        pair: shared with the other layers.
        d_R: (R,) parameter, 0.1.
        b_O: (O,) parameter, zero.
        scale: 1, VeRA has none.
        dropout: probability of dropping an input of this branch, in training.
        storage: as LoRA's.
    """

    scale = 1.0

    def __init__(
        self,
        pair: SharedPair,
        in_features: int,
        out_features: int,
        *,
        dropout: float = 0.0,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__()
        self.pair, self.dropout, self.storage = pair, dropout, dtype
        self.in_features, self.out_features = in_features, out_features
        device = pair.a_RI.device
        self.d_R = adapter_parameter(torch.empty(self.r, dtype=dtype, device=device))
        self.b_O = adapter_parameter(torch.empty(out_features, dtype=dtype, device=device))
        start(self)

    @property
    def r(self) -> int:
        """Rank."""
        return self.pair.a_RI.shape[0]

    def initial(self, name: str) -> torch.Tensor:
        """Where a parameter starts, as a whole, on the CPU."""
        return torch.full((self.r,), D_INITIAL) if name == "d_R" else torch.zeros(self.out_features)

    def update(self) -> Update:
        """The update that the vectors make of the pair's part for this layer."""
        a_RI, b_OR = self.pair.a_RI[:, : self.in_features], self.pair.b_OR[: self.out_features]
        return Update(a_RI, b_OR, self.d_R, self.b_O, self.scale)

    def extra_repr(self) -> str:
        return f"r={self.r}, dropout={self.dropout:g}, {self.d_R.dtype}"


class Startable(Protocol):
    """A module of trained parameters that knows where each starts."""

    storage: torch.dtype

    def initial(self, name: str) -> torch.Tensor:
        """Where a parameter starts, as a whole, on the CPU."""
        ...

    def named_parameters(
        self, prefix: str = ..., recurse: bool = ..., remove_duplicate: bool = ...
    ) -> Iterator[tuple[str, nn.Parameter]]: ...


def start(module: Startable) -> None:
    """Give a module's own parameters their first values; those on the meta device keep waiting for theirs."""
    for name, parameter in module.named_parameters(recurse=False):
        if not parameter.is_meta:
            put(parameter, module.initial(name), module.storage)


def adapter_parameter(value: torch.Tensor) -> nn.Parameter:
    """A trained parameter whose gradient is held and summed in at least float32.

    Micro-batch gradients added up in bfloat16 lose the small ones.
    """
    parameter = nn.Parameter(value)
    parameter.grad_dtype = torch.promote_types(value.dtype, torch.float32)
    return parameter


def kaiming_a(r: int, in_features: int, seed: int) -> torch.Tensor:
    """(R, I) float32, uniform in ±1/sqrt(I): Kaiming with a = sqrt(5), as LoRA and PEFT start A.

    Drawn on the CPU from a generator of its own: the same on every device and rank, and
    whatever else was drawn before.
    """
    generator = torch.Generator().manual_seed(seed)
    bound = 1 / math.sqrt(in_features)
    return torch.empty(r, in_features).uniform_(-bound, bound, generator=generator)


def layer_seed(seed: int, name: str) -> int:
    """A seed for one layer: arms of a comparison get the same A, and no two layers the same one."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")
