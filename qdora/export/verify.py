"""Read an export with plain transformers and compare its logits with the adapted model's.

One model is in memory, and of the exported one the module that computes: its tensors are read from the
files when it is called, and dropped when it returns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn

from qdora.errors import InputError
from qdora.models.formats import Checkpoint
from qdora.models.sources import open_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VERIFIED_POSITIONS = (4, 64)
"""Sequences and tokens on which logits are compared."""

BOUNDS = {torch.float16: 1e-2, torch.bfloat16: 8e-2, torch.float32: 1e-5}
"""Largest relative error of logits: the weights' rounding (2⁻¹¹, 2⁻⁸, 2⁻²⁴), grown over the layers."""


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

    def __str__(self) -> str:
        bound = f" (bound {self.bound:.0e})" if math.isfinite(self.bound) else ""
        return (
            f"verified: plain transformers loads it; logits differ by {self.relative_error:.1e} relative"
            f"{bound}, the same next token at {100 * self.same_next_token:.1f}% of {self.positions} positions"
        )


@torch.no_grad()
def verify_export(
    directory: str | Path, model: PreTrainedModel, input_ids_BT: torch.Tensor | None = None
) -> Verification:
    """Load the folder with transformers and compare its logits with the adapted model's.

    Args:
        directory: the exported folder, unquantized.
        model: the adapted model, in evaluation mode.
        input_ids_BT: (B, T) tokens to compare on; seeded ones where None.
    Raises: VerificationError: it does not load, tensors are missing or left over, or the logits are out of
        bound.
    """
    directory, device = Path(directory), next(model.parameters()).device
    ids_BT = random_tokens(model) if input_ids_BT is None else input_ids_BT
    adapted_BTV = logits(model, ids_BT)
    stored = load_exported(directory, device_map="meta", dtype="auto").dtype  # its keys, none of its values
    bound = bound_for(model, stored)
    compute = torch.float32 if device.type == "cpu" else stored
    exported_BTV = logits(streamed(directory, device, compute), ids_BT, device)
    return compare(directory, exported_BTV, adapted_BTV, bound)


def bound_for(model: PreTrainedModel, stored: torch.dtype) -> float:
    """The looser of the bounds for the exported weights' dtype and the adapted model's activations."""
    token = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    return max(BOUNDS[stored], BOUNDS.get(model.get_input_embeddings()(token).dtype, 0.0))


def random_tokens(model: PreTrainedModel) -> torch.Tensor:
    """Seeded tokens: any text would do, and a folder may come without a tokenizer."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(vocabulary, VERIFIED_POSITIONS, generator=generator)


@torch.no_grad()
def logits(model: PreTrainedModel, ids_BT: torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
    """(B, T, V) float32 on the CPU.

    Args:
        device: of a model whose parameters are elsewhere.
    """
    device = next(model.parameters()).device if device is None else device
    logits_BTV: torch.Tensor = model(input_ids=ids_BT.to(device)).logits
    return logits_BTV.float().cpu()


def compare(
    directory: Path, exported_BTV: torch.Tensor, adapted_BTV: torch.Tensor, bound: float
) -> Verification:
    """Raises: VerificationError: the logits are out of bound."""
    error = float((exported_BTV - adapted_BTV).norm() / adapted_BTV.norm())
    same = (exported_BTV.argmax(-1) == adapted_BTV.argmax(-1)).float().mean()
    if not error <= bound:
        raise VerificationError(
            f"{directory}: relative error of the logits {error:.2e} exceeds the bound {bound:.0e}"
        )
    return Verification(error, bound, float(same), adapted_BTV[..., 0].numel())


def load_exported(directory: Path, **options: Any) -> PreTrainedModel:
    """The folder's model as transformers loads it.

    Args:
        options: of `from_pretrained`.
    Raises: VerificationError: it does not load, or tensors are missing, left over or of another shape.
    """
    try:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            directory, output_loading_info=True, **options
        )
    except Exception as cause:
        raise VerificationError(f"{directory}: transformers cannot load it: {cause}") from cause
    model: PreTrainedModel
    model, info = loaded
    faults = {kind: sorted(info[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(faults.values()):
        raise VerificationError(f"{directory}: transformers reports {faults}")
    return model


def streamed(directory: Path, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The model of an unquantized folder in transformers, of which only the module that runs exists.

    Args:
        directory: or a GGUF file.
        device: that computes.
        dtype: in which.
    """
    from accelerate import init_empty_weights

    checkpoint = open_checkpoint(str(directory))
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(checkpoint.config, dtype=dtype)
    model.tie_weights()
    names = frozenset(checkpoint.names())
    users: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(name)
    stored_as = {
        name: next((other for other in tied if other in names), name)
        for tied in users.values()
        for name in tied
    }
    for name, module in model.named_modules():
        for leaf, buffer in module.named_buffers(recurse=False):
            full = f"{name}.{leaf}"
            module._buffers[leaf] = (checkpoint.read(full) if full in names else buffer).to(device)
        own = {leaf: stored_as[f"{name}.{leaf}"] for leaf, _ in module.named_parameters(recurse=False)}
        if own:
            read = partial(_materialize, checkpoint, own, device, dtype)
            module.register_forward_pre_hook(read)
            module.register_forward_hook(partial(_drop, dict(module._parameters)))
    model.eval()
    return model


def _materialize(
    checkpoint: Checkpoint,
    own: Mapping[str, str],
    device: torch.device,
    dtype: torch.dtype,
    module: nn.Module,
    arguments: Any,
) -> None:
    """Read a module's parameters, by the names under which they are stored."""
    for leaf, name in own.items():
        value = checkpoint.read(name).to(device, dtype)
        module._parameters[leaf] = nn.Parameter(value, requires_grad=False)


def _drop(empty: Mapping[str, nn.Parameter], module: nn.Module, arguments: Any, output: Any) -> None:
    """Put a module's parameters back on the meta device."""
    module._parameters.update(empty)
