"""The identity of a base model, so that an adapter is not put on another one."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

SAMPLES = 256
"""Values of a tensor that enter its digest, evenly spaced."""

_ATTRIBUTE = "qdora_base_fingerprint"


def tensor_digest(name: str, tensor: torch.Tensor) -> str:
    """Digest of a tensor's name, shape and evenly spaced values.

    A sample keeps the cost of streaming a 70B model low; another checkpoint of the same
    architecture differs in nearly all values, so a sample tells it apart.
    """
    flat = tensor.detach().reshape(-1)
    sample = flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES].cpu()
    if sample.is_floating_point():
        sample = sample.float()
    digest = hashlib.sha256(f"{name} {tuple(tensor.shape)} ".encode())
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
