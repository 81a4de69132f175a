"""One safetensors file: a checked header, and its tensors read one at a time into memory of our own.

`safe_open` maps the file and hands out views of the mapping: after the last tensor the whole file
is resident (measured: 400 MB for a 400 MB file of which one 20 MB tensor was kept at a time).

Source: safetensors format, https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from qdora.errors import CheckpointError
from qdora.models.byte_range import read_bytes

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: bytes `start` to `start + size` of `path`."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name, in file order.

    Raises: CheckpointError: missing, truncated or corrupt; a dtype that cannot be read.
    """
    try:
        with safe_open(path, framework="pt"):  # checks the header against the size of the file
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: truncated or corrupt safetensors file: {error}") from None
    header.pop("__metadata__", None)
    tensors = {name: _place(path, name, entry, 8 + length) for name, entry in header.items()}
    return dict(sorted(tensors.items(), key=lambda item: item[1].start))


def read_tensor(place: StoredTensor, rows: slice | None = None) -> torch.Tensor:
    """One tensor or some of its rows, on the CPU, in the dtype of the file; no other byte is read.

    Args:
        rows: start and stop along the first dimension; all where None.
    Raises: CheckpointError: the file became shorter.
    """
    shape, first = place.shape, 0
    if rows is not None and shape:
        shape, first = (rows.stop - rows.start, *shape[1:]), rows.start * math.prod(shape[1:])
    count = math.prod(shape)
    if count == 0:  # torch does not reinterpret a tensor without elements
        return torch.empty(shape, dtype=place.dtype)
    size = place.dtype.itemsize
    raw = torch.from_numpy(read_bytes(place.path, place.start + first * size, count * size))
    return raw.view(place.dtype).view(shape)


def _place(path: Path, name: str, entry: dict[str, Any], data_start: int) -> StoredTensor:
    dtype = _DTYPES.get(str(entry["dtype"]))
    if dtype is None:
        raise CheckpointError(f"{path}: tensor {name}: dtype {entry['dtype']} cannot be read")
    first, last = entry["data_offsets"]
    return StoredTensor(path, dtype, tuple(entry["shape"]), data_start + first, last - first)
