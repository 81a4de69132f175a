"""Model folders that bitsandbytes has quantized already: taken as they are, byte for byte.

Such a layer is stored as its packed codes, `X.weight`, and a handful of statistics,
`X.weight.absmax` and so on, one of them a small JSON text as uint8.
"""

from __future__ import annotations

from collections.abc import Callable

import bitsandbytes.functional as bnb
import torch

from qdora.config import BaseKind
from qdora.errors import CheckpointError, InputError
from qdora.models.checkpoint import Checkpoint
from qdora.quant.nf4 import NF4Weight

_STATE = ".weight.quant_state.bitsandbytes__"
_PLAIN = ("absmax", "quant_map")
_NESTED = ("nested_absmax", "nested_quant_map")

WeightOf = Callable[[tuple[int, int]], NF4Weight]


def check_quantization(checkpoint: Checkpoint, base: BaseKind) -> bool:
    """Whether the checkpoint is quantized to NF4 already.

    Raises: InputError: it is quantized in another way, or a dense base was asked for.
    """
    stated = checkpoint.quantization
    if stated is None:
        return False
    kind = stated.get("bnb_4bit_quant_type") if stated.get("load_in_4bit") else stated.get("quant_method")
    if kind != "nf4":
        raise InputError(f"{checkpoint.origin}: quantized as {kind!r}; allowed: nf4 (bitsandbytes), or none")
    if base != "nf4":
        raise InputError(f"{checkpoint.origin}: already quantized to nf4; model.base must be 'nf4'")
    return True


class PrequantizedParts:
    """Collects the tensors of each stored layer until they are complete."""

    def __init__(self) -> None:
        self._parts: dict[str, dict[str, torch.Tensor]] = {}

    def is_part(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether a tensor belongs to a quantized layer."""
        return ".weight." in name or (name.endswith(".weight") and tensor.dtype == torch.uint8)

    def add(self, name: str, tensor: torch.Tensor) -> tuple[str, WeightOf] | None:
        """Take a part; once its layer is complete, the layer's name and its weight, given the shape.

        Raises: CheckpointError: the statistics cannot be used.
        """
        layer = name.partition(".weight")[0]
        parts = self._parts.setdefault(layer, {})
        parts[name] = tensor
        if not _complete(layer, parts):
            return None
        del self._parts[layer]
        return layer, lambda shape: _weight(layer, parts, shape)

    def incomplete(self) -> list[str]:
        """Layers of which some part never came."""
        return sorted(self._parts)


def _complete(layer: str, parts: dict[str, torch.Tensor]) -> bool:
    state = [name for name in parts if name.startswith(layer + _STATE)]
    if not state or f"{layer}.weight" not in parts:
        return False
    nested = "nested" in bytes(parts[state[0]].cpu().tolist()).decode("utf-8", "replace")
    wanted = _PLAIN + (_NESTED if nested else ())
    return all(f"{layer}.weight.{part}" in parts for part in wanted)


def _weight(layer: str, parts: dict[str, torch.Tensor], shape: tuple[int, int]) -> NF4Weight:
    packed = parts.pop(f"{layer}.weight")
    try:
        state = bnb.QuantState.from_dict(parts, device=packed.device)
        if tuple(state.shape) != shape:
            raise ValueError(f"shape {tuple(state.shape)}, the model's configuration says {shape}")
        return NF4Weight.from_quant_state(packed, state, shape)
    except (ValueError, AssertionError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{layer}.weight: unusable quantization statistics: {error}") from None
