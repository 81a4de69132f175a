"""4-bit weights as bitsandbytes serializes them, of a checkpoint or of a loaded model: taken byte for byte.

Such a layer is stored as its packed codes, `X.weight`, and a handful of statistics, `X.weight.absmax` and so
on, one of them a small JSON text as uint8.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qdora.errors import InputError
from qdora.files import parse_object
from qdora.quant.base import FULL, FrozenWeight, Shard
from qdora.quant.blockwise import CODE_BOOK, SCALES_PER_BLOCK, BlockwiseWeight, import_bitsandbytes
from qdora.quant.fp4 import FP4Weight
from qdora.quant.nf4 import NF4Weight

STORED_TYPES: Mapping[str, type[BlockwiseWeight]] = {"nf4": NF4Weight, "fp4": FP4Weight}
"""Formats of bitsandbytes' 4-bit checkpoints, by their `quant_type`."""


_METHODS = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "fp8": "8-bit floats (fp8)",
    "fbgemm_fp8": "8-bit floats (fbgemm_fp8)",
    "mxfp4": "MXFP4 (4-bit floats)",
    "compressed-tensors": "llm-compressor (compressed-tensors)",
}
"""What the `quant_method` of other formats is called."""

_STATE = ".quant_state.bitsandbytes__"
_ABSMAX, _NESTED_ABSMAX, _NESTED_CODE = ".absmax", ".nested_absmax", ".nested_quant_map"

Read = Callable[[str, slice | None], torch.Tensor]
"""A tensor of the checkpoint by name, or some of its rows, on the CPU."""


@dataclass(frozen=True)
class StoredWeight:
    """A layer that is stored quantized: how, as its small JSON says.

    Attributes:
        name: of its packed codes; the statistics are called after it.
        kind: its format.
        shape: (out, in).
        nested_block_size: scales that share one; the default where they are not quantized again.
        offset: of the second quantization; None where there is none.
    """

    name: str
    kind: type[BlockwiseWeight]
    shape: tuple[int, int]
    block_size: int
    nested_block_size: int
    offset: float | None

    def on_meta(self) -> BlockwiseWeight:
        """The weight without its bytes."""
        return self.kind(
            self.shape,
            block_size=self.block_size,
            double_quantization=self.offset is not None,
            nested_block_size=self.nested_block_size,
        )

    def read(self, read: Read, shard: Shard, device: torch.device) -> dict[str, torch.Tensor]:
        """A shard's parameters, and the buffers, for `FrozenWeight.assign`."""
        width = self.shape[1] // self.kind.codes_per_byte
        rows = shard.rows(self.shape[0])
        blocks = shard.rows(-(-math.prod(self.shape) // self.block_size))
        packed = read(self.name, slice(rows.start * width, rows.stop * width)).view(torch.uint8)
        tensors = {
            "packed": packed.view(rows.stop - rows.start, width),
            "absmax": read(self.name + _ABSMAX, blocks),
        }
        if self.offset is not None:
            tensors |= {
                "nested_absmax": read(self.name + _NESTED_ABSMAX, None),
                "nested_code": read(self.name + _NESTED_CODE, None),
                "offset": torch.tensor(self.offset),
            }
        return {name: tensor.to(device) for name, tensor in tensors.items()}

    def expected(self) -> dict[str, tuple[int, torch.dtype]]:
        """Number of values and dtype of each stored tensor, by its name."""
        blocks = -(-math.prod(self.shape) // self.block_size)
        expected = {self.name: (math.prod(self.shape) // self.kind.codes_per_byte, torch.uint8)}
        expected[self.name + _ABSMAX] = (blocks, torch.float32 if self.offset is None else torch.uint8)
        if self.offset is not None:
            expected[self.name + _NESTED_ABSMAX] = (-(-blocks // self.nested_block_size), torch.float32)
            expected[self.name + _NESTED_CODE] = (CODE_BOOK, torch.float32)
        return expected


def as_stored(weight: FrozenWeight) -> BlockwiseWeight:
    """A weight whose format is one of `STORED_TYPES`, by its type."""
    assert isinstance(weight, BlockwiseWeight)
    return weight


def stored_type(stated: Mapping[str, Any]) -> str:
    """The format of a checkpoint's quantized weights, of `STORED_TYPES`, from its `quantization_config`.

    Raises: ValueError: another one; it is named.
    """
    # Folders written before quant_method existed are bitsandbytes ones.
    method = str(stated.get("quant_method", "bitsandbytes"))
    if method != "bitsandbytes":
        bits = stated.get("bits", stated.get("w_bit"))
        what = _METHODS.get(method, repr(method)) + (f", {bits} bits" if bits else "")
    elif stated.get("load_in_8bit"):
        what = "bitsandbytes to 8 bits (LLM.int8)"
    elif not stated.get("load_in_4bit"):
        what = "bitsandbytes in a way that its settings do not tell"
    elif (kind := str(stated.get("bnb_4bit_quant_type", "fp4"))) not in STORED_TYPES:
        what = f"bitsandbytes to 4 bits of type {kind!r}"
    else:
        return kind
    allowed = " and ".join(STORED_TYPES)
    raise ValueError(
        f"weights quantized by {what} cannot be read; allowed: bitsandbytes' 4-bit types {allowed}, or "
        f"unquantized weights, which model.quantization quantizes as they load: give the unquantized model"
    )


def is_statistic(name: str) -> bool:
    """Whether a tensor of a checkpoint is a statistic of a stored layer, and not its codes."""
    return ".weight." in name


def state_name(name: str, names: frozenset[str]) -> str | None:
    """The tensor with the small JSON of a weight; None where the weight is not stored quantized."""
    return next((other for other in names if other.startswith(name + _STATE)), None)


def parse_state(
    name: str, state: torch.Tensor, shape: tuple[int, int], allowed: Collection[str] = STORED_TYPES
) -> StoredWeight:
    """How a weight is stored, from its small JSON.

    Args:
        state: uint8 text.
        allowed: formats, of `STORED_TYPES`, that it may be in.
        shape: (out, in), as the model's configuration says.
    Raises: ValueError, TypeError, KeyError, OverflowError: it cannot be used.
    """
    values = parse_object(bytes(state.tolist()), name)
    if values["quant_type"] not in allowed:
        names = " and ".join(allowed).upper()
        raise ValueError(f"only {names} weights are supported, got {values['quant_type']!r}")
    kind = STORED_TYPES[values["quant_type"]]
    if tuple(values["shape"]) != shape:
        raise ValueError(f"shape {tuple(values['shape'])}, the model's configuration says {shape}")
    offset = values.get("nested_offset")
    return StoredWeight(
        name,
        kind,
        shape,
        int(values["blocksize"]),
        int(values.get("nested_blocksize", SCALES_PER_BLOCK)),
        None if offset is None else float(offset),
    )


def _is_linear_4bit(layer: nn.Linear) -> bool:
    import_bitsandbytes()
    from bitsandbytes.nn import modules

    return isinstance(layer, modules.Linear4bit)


def adopt_linear(layer: nn.Linear, name: str) -> FrozenWeight | None:
    """The weight of a layer that bitsandbytes has quantized to 4 bits, with its bytes; None of a plain layer.

    Args:
        name: of the layer, for errors.
    Raises: InputError: the layer is quantized in another way, so that its numbers are no weights.
    """
    if layer.weight.dtype == torch.uint8 and _is_linear_4bit(layer):
        # Its state dict has the bytes in their serialized order, whatever the CPU's kernels made of them.
        tensors = {f"{name}.{key}": tensor for key, tensor in layer.state_dict().items()}
        state = state_name(f"{name}.weight", frozenset(tensors))
        if state is not None:
            shape = (layer.out_features, layer.in_features)
            stored = parse_state(f"{name}.weight", tensors[state], shape)
            weight = stored.on_meta()
            weight.assign(
                stored.read(
                    lambda key, rows: tensors[key] if rows is None else tensors[key][rows],
                    FULL,
                    layer.weight.device,
                )
            )
            return weight
    plain = layer.weight.dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    if not plain or (type(layer).forward is not nn.Linear.forward and not getattr(layer, "adoptable", False)):
        raise InputError(
            f"{name} is a {type(layer).__name__} with a weight of {layer.weight.dtype}: it holds no plain "
            f"weight, or computes in a way of its own; allowed: nn.Linear in 16 bits or more, and "
            f"bitsandbytes' 4-bit layers ({', '.join(STORED_TYPES)})"
        )
    return None
