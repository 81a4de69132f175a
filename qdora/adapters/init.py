"""How a LoRA's A and B start, and what PEFT calls each start.

R rank, I in_features, O out_features.  Every start is drawn on the CPU from a generator of its own: the same
on every device and rank, and whatever else was drawn before.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from qdora.config import InitName

Start = Callable[[int, int, int, int], tuple[torch.Tensor, torch.Tensor]]
"""From (O, I, R, seed) to A (R, I) and B (O, R), float32."""


@dataclass(frozen=True)
class Init:
    """A start of A and B.

    Attributes:
        draw: the values that need no weight.
        peft: PEFT's `init_lora_weights`; None where PEFT would make other numbers of it when it loads.
        from_weight: the weight's top singular vectors replace what was drawn, and leave the frozen weight.
    """

    draw: Start
    peft: bool | str | None
    from_weight: bool = False


def kaiming(out_features: int, in_features: int, r: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A uniform in ±1/sqrt(I), Kaiming with a = sqrt(5) as LoRA and PEFT start it; B zero."""
    bound = 1 / math.sqrt(in_features)
    a_RI = torch.empty(r, in_features).uniform_(-bound, bound, generator=_generator(seed))
    return a_RI, torch.zeros(out_features, r)


def gaussian(out_features: int, in_features: int, r: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A normal with standard deviation 1/R (LoRA, arXiv:2106.09685 §4.1, as PEFT scales it); B zero."""
    return torch.randn(r, in_features, generator=_generator(seed)) / r, torch.zeros(out_features, r)


def orthogonal(out_features: int, in_features: int, r: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B both not zero, their product zero.

    A lies in the span of the even rows of an orthogonal (R, R) matrix, B in that of the odd ones; both are
    normal with standard deviation about 1/10.  R must be even.

    Source: PEFT, `LoraLayer.orthogonal_init`.
    """
    generator = _generator(seed)
    q_RR, _ = torch.linalg.qr(torch.randn(r, r, generator=generator))
    a_RI = (torch.randn(in_features, r // 2, generator=generator) @ q_RR[0::2]).T / 10
    b_OR = torch.randn(out_features, r // 2, generator=generator) @ q_RR[1::2] / 10
    return a_RI.contiguous(), b_OR.contiguous()


def principal(w_OI: torch.Tensor, r: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B with c B A the best rank-R approximation of W, its singular values split evenly.

    Source: PiSSA, arXiv:2404.02948 §3.
    """
    u_OK, s_K, vh_KI = torch.linalg.svd(w_OI.float(), full_matrices=False)
    root_R = (s_K[:r] / scale).sqrt()
    return root_R[:, None] * vh_KI[:r], u_OK[:, :r] * root_R


INITS: Mapping[InitName, Init] = {
    "kaiming": Init(kaiming, peft=True),
    "gaussian": Init(gaussian, peft="gaussian"),
    "orthogonal": Init(orthogonal, peft="orthogonal"),
    # Drawn as Kaiming's until the weight is there; with B zero the model is the same before and after.
    "pissa": Init(kaiming, peft=None, from_weight=True),
}


def init_from_peft(value: bool | str) -> InitName:
    """Our name of PEFT's `init_lora_weights`.

    Raises: ValueError: a start that changes the base weight when PEFT loads it, or that is unknown.
    """
    for name, init in INITS.items():
        if init.peft == value and isinstance(value, type(init.peft)):
            return name
    if value is False:
        return "kaiming"  # PEFT drew A and B in some way of its own; the file has what became of them
    allowed = ", ".join(repr(init.peft) for init in INITS.values() if init.peft is not None)
    raise ValueError(
        f"init_lora_weights = {value!r} is not supported: with it PEFT may change the base weight when it "
        f"loads the adapter; allowed: {allowed}"
    )


def layer_seed(seed: int, name: str) -> int:
    """A seed for one layer: arms of a comparison get the same A, and no two layers the same one."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
