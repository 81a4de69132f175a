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

Split = Callable[[torch.Tensor, int, float], tuple[torch.Tensor, torch.Tensor]]
"""From W (O, I), R and the scale c to A (R, I) and B (O, R), float32; c B A leaves the frozen weight."""


@dataclass(frozen=True)
class Init:
    """A start of A and B.

    Attributes:
        draw: the values that need no weight.
        peft: PEFT's `init_lora_weights`.
        from_weight: makes A and B of the weight instead; None where the start does not look at it.  PEFT
            makes them anew, of the weight at hand, when it loads an adapter that names such a start.
        quantized: whether PEFT starts from a quantized weight so.
    """

    draw: Start
    peft: bool | str
    from_weight: Split | None = None
    quantized: bool = True


def kaiming(out_features: int, in_features: int, r: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A uniform in ±1/sqrt(I), Kaiming with a = sqrt(5) as LoRA and PEFT start it; B zero."""
    bound = 1 / math.sqrt(in_features)
    a_RI = torch.empty(r, in_features).uniform_(-bound, bound, generator=_generator(seed))
    return a_RI, torch.zeros(out_features, r)


def gaussian(out_features: int, in_features: int, r: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A normal with standard deviation 1/R (LoRA, arXiv:2106.09685 §4.1, as PEFT scales it); B zero."""
    return torch.randn(r, in_features, generator=_generator(seed)) / r, torch.zeros(out_features, r)


def gaussian_sqrt(
    out_features: int, in_features: int, r: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A normal with variance 1/R, so that A x has the size of x; B zero.

    Source: AnswerDotAI/fsdp_qlora, `scripts/dora.py`.
    """
    return torch.randn(r, in_features, generator=_generator(seed)) / r**0.5, torch.zeros(out_features, r)


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


def orthonormal(w_OI: torch.Tensor, r: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B the first rows of R and columns of Q, with W = Q R; c does not enter them.

    Source: OLoRA, arXiv:2406.01775 §3.
    """
    q_OK, r_KI = torch.linalg.qr(w_OI.float())
    return r_KI[:r].contiguous(), q_OK[:, :r].contiguous()


INITS: Mapping[InitName, Init] = {
    "kaiming": Init(kaiming, peft=True),
    "gaussian": Init(gaussian, peft="gaussian"),
    # Drawn in a way that PEFT has no name for.
    "gaussian_sqrt": Init(gaussian_sqrt, peft=False),
    "orthogonal": Init(orthogonal, peft="orthogonal"),
    # Drawn as Kaiming's until the weight is there; with B zero the model is the same before and after.
    "pissa": Init(kaiming, peft="pissa", from_weight=principal, quantized=False),
    "olora": Init(kaiming, peft="olora", from_weight=orthonormal),
}

CONVERT = (
    "convert the adapter in PEFT, where it was trained: model.save_pretrained(folder, "
    "path_initial_model_for_weight_conversion=FOLDER OF THE INITIAL ADAPTER)"
)
_REFUSED = {
    "pissa_niter_": f"it approximates singular vectors at random, anew at every load; {CONVERT}",
    "corda": f"it changed the base weight by statistics that the file does not have; {CONVERT}",
    "lora_ga": f"it changed the base weight by gradients that the file does not have; {CONVERT}",
    "loftq": "it quantized the base weight around the adapter; save that base and set it to true",
    "mica": "B would have to stay as it is while A is trained",
}
"""Why a start of PEFT is refused, by its name or how that begins."""


def init_from_peft(value: object) -> InitName:
    """Our name of PEFT's `init_lora_weights`.

    Raises: ValueError: a start of which PEFT makes numbers that cannot be had here, or that is unknown.
    """
    named = value.lower() if isinstance(value, str) else value
    for name, init in INITS.items():
        if init.peft == named and isinstance(named, type(init.peft)):
            return name
    if named == "eva":
        return "kaiming"  # drawn in another way; loading does nothing but take what became of A and B
    why = next((why for start, why in _REFUSED.items() if str(named).startswith(start)), "an unknown start")
    allowed = ", ".join(repr(peft) for peft in (*(init.peft for init in INITS.values()), "eva"))
    raise ValueError(f"init_lora_weights = {value!r} is not supported: {why}; allowed: {allowed}")


def layer_seed(seed: int, name: str) -> int:
    """A seed for one layer: arms of a comparison get the same A, and no two layers the same one."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
