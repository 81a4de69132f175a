"""The low-rank direction of an adapted layer: c B A."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import nn


class LowRank(nn.Module):
    """LoRA's factors (arXiv:2106.09685 §4.1).

    Attributes:
        a_RI: (R, I) parameter, Kaiming-uniform.
        b_OR: (O, R) parameter, zero.
        scale: the factor before BA.
        dropout: probability of dropping an input of this branch, in training.
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
        self.scale, self.dropout = scale, dropout
        a_RI = kaiming_a(r, in_features, seed)
        self.a_RI = adapter_parameter(a_RI.to(device=device, dtype=dtype))
        self.b_OR = adapter_parameter(torch.zeros(out_features, r, dtype=dtype, device=device))

    @property
    def r(self) -> int:
        """Rank."""
        return self.a_RI.shape[0]

    def extra_repr(self) -> str:
        return f"r={self.r}, scale={self.scale:g}, dropout={self.dropout:g}, {self.a_RI.dtype}"


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
