"""Verify an exported folder: plain transformers loads it, and its logits are the adapted model's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qdora.errors import InputError

BOUNDS = {torch.float16: 1e-2, torch.bfloat16: 8e-2}
"""Largest relative error of logits: the weights' rounding (2⁻¹¹, 2⁻⁸), grown over the layers."""


class VerificationError(InputError):
    """The export does not load cleanly, or its logits differ from the adapted model's."""


@dataclass(frozen=True)
class Verification:
    """How near the exported model's logits are to the adapted model's.

    Attributes:
        relative_error: ||exported − adapted|| / ||adapted|| over all logits.
        bound: largest relative error that is accepted.
        same_next_token: fraction of positions with the same most likely next token.
        positions: how many were compared.
    """

    relative_error: float
    bound: float
    same_next_token: float
    positions: int


@torch.no_grad()
def verify_export(directory: str | Path, model: PreTrainedModel, input_ids_BT: torch.Tensor) -> Verification:
    """Load the folder with transformers and compare its logits with the adapted model's.

    Args:
        directory: the exported folder.
        model: the adapted model, in evaluation mode.
        input_ids_BT: (B, T) tokens to compare on.
    Raises: VerificationError: tensors are missing or left over, or the logits are out of bound.
    """
    device = next(model.parameters()).device
    adapted_BTV = model(input_ids=input_ids_BT.to(device)).logits.float().cpu()
    compute = torch.float32 if device.type == "cpu" else "auto"
    loaded: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=compute, output_loading_info=True)
    exported, info = loaded
    faults = {kind: sorted(info[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(faults.values()):
        raise VerificationError(f"{directory}: transformers reports {faults}")
    exported_BTV = exported.to(device)(input_ids=input_ids_BT.to(device)).logits.float().cpu()
    error = float((exported_BTV - adapted_BTV).norm() / adapted_BTV.norm())
    same = (exported_BTV.argmax(-1) == adapted_BTV.argmax(-1)).float().mean()
    result = Verification(error, _bound(directory, model), float(same), input_ids_BT.numel())
    if not error <= result.bound:
        raise VerificationError(
            f"{directory}: relative error of the logits {error:.2e} exceeds the bound {result.bound:.0e}"
        )
    return result


def _bound(directory: str | Path, model: PreTrainedModel) -> float:
    """The looser of the bounds for the exported weights' dtype and the adapted model's activations."""
    # From config.json: the loaded weights may have been widened.
    stored: torch.dtype = AutoConfig.from_pretrained(directory).dtype
    embedding = model.get_input_embeddings()
    activation = embedding(torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device))
    return max(BOUNDS[stored], BOUNDS.get(activation.dtype, 0.0))
