"""Which inputs of a low-rank update dropout keeps: drawn again in backward from a seed, not kept.

An operator of torch, so that a compiled graph, which cannot hold a generator, contains it.
"""

from __future__ import annotations

import torch

_LIBRARY = torch.library.Library("qdora", "FRAGMENT")
_LIBRARY.define("keep_mask(Tensor like, SymInt inputs, float dropout, Tensor seed) -> Tensor")


def draw_seed() -> torch.Tensor:
    """() int64 from the CPU generator: activation recomputation restores it, and no device waits."""
    return torch.randint(2**62, ())


def keep_mask(like: torch.Tensor, inputs: int, dropout: float, seed: torch.Tensor) -> torch.Tensor:
    """(N, inputs) of 0 and 1/(1-p), dtype and rows of `like`; p is `dropout` rounded to 16 bits.

    The same for the same seed.  Four decisions come from each 64 random bits, since a CPU draws them one
    after the other.

    Args:
        seed: () int64 on the CPU.
    """
    mask: torch.Tensor = torch.ops.qdora.keep_mask(like, inputs, dropout, seed)
    return mask


def _draw_mask(like: torch.Tensor, inputs: int, dropout: float, seed: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator(device=like.device).manual_seed(int(seed))
    count = like.shape[0] * inputs
    bits = torch.empty(-(-count // 4), dtype=torch.int64, device=like.device)
    bits.random_(-(2**63), None, generator=generator)
    dropped = min(round(dropout * 2**16), 2**16 - 1)
    kept = bits.view(torch.int16)[:count].view(-1, inputs) >= dropped - 2**15
    return kept.to(like.dtype).mul_(2**16 / (2**16 - dropped))


def _fake_mask(like: torch.Tensor, inputs: int, dropout: float, seed: torch.Tensor) -> torch.Tensor:
    return like.new_empty(like.shape[0], inputs)


_LIBRARY.impl("keep_mask", _draw_mask, "CompositeExplicitAutograd")
torch.library.register_fake("qdora::keep_mask", _fake_mask, lib=_LIBRARY)
