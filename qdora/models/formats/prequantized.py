"""Model folders that bitsandbytes has quantized already: taken as they are, byte for byte.

Such a layer is stored as its packed codes, `X.weight`, and a handful of statistics,
`X.weight.absmax` and so on, one of them a small JSON text as uint8.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qdora.config import BaseKind
from qdora.errors import CheckpointError, InputError
from qdora.models.formats import Checkpoint
from qdora.quant.nf4 import CODE_BOOK
from qdora.quant.nf4_quantize import ABSMAX_BLOCK, NF4Parts, block_count
from qdora.quant.share import Share

_STATE = ".quant_state.bitsandbytes__"
_ABSMAX, _NESTED_ABSMAX, _NESTED_CODE = ".absmax", ".nested_absmax", ".nested_quant_map"


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


@dataclass(frozen=True)
class StoredNF4:
    """A layer that is stored as NF4: how, as its small JSON says.

    Attributes:
        weight: name of its packed codes; the statistics are called after it.
        shape: (out, in).
        nested_block_size: scales that share one; ABSMAX_BLOCK where they are not quantized again.
        offset: of the second quantization; None where there is none.
    """

    weight: str
    shape: tuple[int, int]
    block_size: int
    nested_block_size: int
    offset: float | None


def is_part(name: str) -> bool:
    """Whether a tensor is a statistic of a stored layer, and not its codes."""
    return ".weight." in name


def stored_nf4(
    checkpoint: Checkpoint, names: frozenset[str], weight: str, shape: tuple[int, int]
) -> StoredNF4 | None:
    """How a linear layer's weight is stored; None where it is not quantized.

    Args:
        names: of all tensors of the checkpoint.
        weight: name of the weight.
        shape: (out, in), as the model's configuration says.
    Raises: CheckpointError: a statistic is missing or cannot be used.
    """
    states = [name for name in names if name.startswith(weight + _STATE)]
    if not states and checkpoint.info(weight).dtype != torch.uint8:
        return None
    try:
        if not states:
            raise ValueError(f"tensor {weight}{_STATE}nf4 is missing")
        state = json.loads(bytes(checkpoint.read(states[0]).tolist()))
        stored = _stored(weight, state, shape)
        _check_parts(checkpoint, names, stored)
        return stored
    except (ValueError, TypeError, KeyError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{weight}: unusable quantization statistics: {error}") from None


def read_stored(checkpoint: Checkpoint, stored: StoredNF4, share: Share, device: torch.device) -> NF4Parts:
    """A rank's share of a stored layer's bytes.

    Raises: CheckpointError: the file became shorter.
    """
    half = stored.shape[1] // 2
    rows = share.rows(stored.shape[0])
    packed = checkpoint.read(stored.weight, slice(rows.start * half, rows.stop * half))
    blocks = share.rows(block_count(stored.shape, stored.block_size))
    absmax = checkpoint.read(stored.weight + _ABSMAX, blocks).to(device)
    packed = packed.view(torch.uint8).view(rows.stop - rows.start, half).to(device)
    if stored.offset is None:
        return NF4Parts(packed, absmax)
    return NF4Parts(
        packed,
        absmax,
        checkpoint.read(stored.weight + _NESTED_ABSMAX).to(device),
        checkpoint.read(stored.weight + _NESTED_CODE).to(device),
        torch.tensor(stored.offset, device=device),
    )


def _stored(weight: str, state: Mapping[str, Any], shape: tuple[int, int]) -> StoredNF4:
    if state["quant_type"] != "nf4":
        raise ValueError(f"only NF4 weights are supported, got {state['quant_type']!r}")
    if tuple(state["shape"]) != shape:
        raise ValueError(f"shape {tuple(state['shape'])}, the model's configuration says {shape}")
    offset = state.get("nested_offset")
    return StoredNF4(
        weight,
        shape,
        int(state["blocksize"]),
        int(state.get("nested_blocksize", ABSMAX_BLOCK)),
        None if offset is None else float(offset),
    )


def _check_parts(checkpoint: Checkpoint, names: frozenset[str], stored: StoredNF4) -> None:
    """Raises: ValueError: a part is missing or has another size or dtype than it must have."""
    blocks = block_count(stored.shape, stored.block_size)
    double = stored.offset is not None
    expected = {
        "": (math.prod(stored.shape) // 2, torch.uint8),
        _ABSMAX: (blocks, torch.uint8 if double else torch.float32),
    }
    if double:
        expected[_NESTED_ABSMAX] = (-(-blocks // stored.nested_block_size), torch.float32)
        expected[_NESTED_CODE] = (CODE_BOOK, torch.float32)
    for part, (count, dtype) in expected.items():
        name = stored.weight + part
        if name not in names:
            raise ValueError(f"tensor {name} is missing")
        facts = checkpoint.info(name)
        if math.prod(facts.shape) != count or facts.dtype.itemsize != dtype.itemsize:
            raise ValueError(
                f"tensor {name} is {facts.dtype} of shape {tuple(facts.shape)}, expected {count} x {dtype}"
            )
