"""The identity of a base model, so that an adapter is not put on another one."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import nn

from qdora.quant.base import FULL

SAMPLES = 256
"""Values of a tensor that enter its digest, evenly spaced."""

_ATTRIBUTE = "qdora_base_fingerprint"


def tensor_digest(name: str, tensor: torch.Tensor) -> str:
    """Digest of a tensor's name, shape and evenly spaced values.

    A sample keeps the cost of streaming a 70B model low; another checkpoint of the same
    architecture differs in nearly all values, so a sample tells it apart.
    """
    shape = tuple(tensor.shape)
    return sample_digest(name, shape, sample_rows(tensor, shape, FULL.rows(shape[0] if shape else 1)))


def sample_rows(
    tensor: torch.Tensor, shape: tuple[int, ...], rows: slice, first_row: int = 0
) -> torch.Tensor:
    """The evenly spaced values of a tensor that lie in some of its rows: those of all ranks make the sample.

    Args:
        tensor: rows `first_row` and following of the whole, at least up to `rows.stop`.
        shape: of the whole tensor.
        rows: whose values are wanted.
    Returns: (K,) on the CPU, floating point as float32.
    """
    width, count = math.prod(shape[1:]), math.prod(shape)
    step = max(1, count // SAMPLES)
    positions = torch.arange(0, count, step)[:SAMPLES]
    own = positions[(positions >= rows.start * width) & (positions < rows.stop * width)]
    sample = tensor.detach().reshape(-1)[(own - first_row * width).to(tensor.device)].cpu()
    return sample.float() if sample.is_floating_point() else sample


def sample_digest(name: str, shape: tuple[int, ...], sample: torch.Tensor) -> str:
    """Digest of a name, a shape and the sample of all rows."""
    digest = hashlib.sha256(f"{name} {shape} ".encode())
    digest.update(sample.contiguous().numpy().tobytes())
    return digest.hexdigest()


def combine(digests: dict[str, str]) -> str:
    """One fingerprint of all tensors' digests, in whatever order they came."""
    lines = "\n".join(f"{name} {digests[name]}" for name in sorted(digests))
    return hashlib.sha256(lines.encode()).hexdigest()


def set_base_fingerprint(model: nn.Module, fingerprint: str) -> None:
    """Remember which base a loaded model is."""
    object.__setattr__(model, _ATTRIBUTE, fingerprint)


def base_fingerprint(model: nn.Module) -> str | None:
    """Fingerprint of a model's base; None for a model that `load_base` did not load."""
    value = getattr(model, _ATTRIBUTE, None)
    return value if isinstance(value, str) else None
