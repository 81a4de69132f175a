"""The header of a GGUF file: its metadata and where its tensors lie.

Written here, and not taken from the `gguf` package, because that package's reader keeps an array
object for every token and merge (seconds and hundreds of megabytes for a LLaMA 3 vocabulary), maps
the whole file, and does not notice that a file ends early.

Source: GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from qdora.errors import CheckpointError, InputError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True)
class TensorPlace:
    """Where one tensor lies.

    Attributes:
        name: llama.cpp's name, for example `blk.0.attn_q.weight`.
        shape: in torch's order, (out, in) for a linear layer.
        kind: how its values are encoded.
        start: first byte, from the start of the file.
        size: in bytes.
    """

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int
    size: int


@dataclass(frozen=True)
class Header:
    """Metadata by llama.cpp's key, and the tensors in file order."""

    metadata: dict[str, Any]
    tensors: tuple[TensorPlace, ...]


def read_header(path: Path) -> Header:
    """Read and check the header of a GGUF file.

    Raises: CheckpointError: not a GGUF file, truncated or corrupt.
        InputError: a version, byte order or encoding that cannot be read.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            return _Reader(path, file, size).header()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None


class _Reader:
    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.file, self.size = path, file, size

    def header(self) -> Header:
        if self.size < 4 or self.take(4) != b"GGUF":
            raise CheckpointError(f"{self.path}: not a GGUF file (it does not begin with 'GGUF')")
        version = self.scalar("I")
        if version not in _VERSIONS:
            order = "big-endian " if version & 0xFFFF == 0 else ""
            raise InputError(f"{self.path}: {order}GGUF version {version}; readable: little-endian 2 and 3")
        tensor_count, pair_count = self.scalar("Q"), self.scalar("Q")
        metadata = dict(self.pair() for _ in range(pair_count))
        rows = [self.row() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise CheckpointError(f"{self.path}: corrupt: general.alignment is {alignment!r}")
        data_start = math.ceil(self.file.tell() / alignment) * alignment
        return Header(metadata, self.places(rows, data_start))

    def places(
        self, rows: list[tuple[str, tuple[int, ...], int, int]], data_start: int
    ) -> tuple[TensorPlace, ...]:
        places = tuple(self.place(row, data_start) for row in rows)
        if len({place.name for place in places}) != len(places):
            raise CheckpointError(f"{self.path}: corrupt: a tensor name occurs twice")
        end = max((place.start + place.size for place in places), default=0)
        if end > self.size:
            raise CheckpointError(
                f"{self.path}: truncated: its tensors need {end} bytes, the file has {self.size}"
            )
        return places

    def place(self, row: tuple[str, tuple[int, ...], int, int], data_start: int) -> TensorPlace:
        name, shape, kind_number, offset = row
        try:
            kind = GGMLQuantizationType(kind_number)
        except ValueError:
            raise InputError(f"{self.path}: tensor {name}: unknown encoding {kind_number}") from None
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if not shape or shape[-1] % block:
            raise CheckpointError(f"{self.path}: corrupt: {name} {shape} is not whole {kind.name} blocks")
        return TensorPlace(name, shape, kind, data_start + offset, math.prod(shape) // block * block_bytes)

    def row(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string()
        shape = tuple(self.scalar("Q") for _ in range(self.scalar("I")))
        return name, shape[::-1], self.scalar("I"), self.scalar("Q")

    def pair(self) -> tuple[str, Any]:
        key = self.string()
        return key, self.value(self.scalar("I"))

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array(self.scalar("I"), self.scalar("Q"))
        return self.scalar(self.code(kind))

    def array(self, kind: int, count: int) -> list[Any]:
        if kind == _STRING:
            return [self.string() for _ in range(count)]
        code = self.code(kind)
        values: list[Any] = np.frombuffer(self.take(count * struct.calcsize(code)), dtype=f"<{code}").tolist()
        return values

    def code(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise CheckpointError(f"{self.path}: corrupt: metadata of type {kind}")
        return _SCALARS[kind]

    def string(self) -> str:
        try:
            return self.take(self.scalar("Q")).decode("utf-8")
        except UnicodeDecodeError:
            raise CheckpointError(f"{self.path}: corrupt: a text in its header is not UTF-8") from None

    def scalar(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(code)))[0]

    def take(self, count: int) -> bytes:
        # Checked before reading: a corrupt length must not ask for terabytes of memory.
        if count > self.size - self.file.tell():
            raise CheckpointError(f"{self.path}: truncated or corrupt: it ends inside its header")
        return self.file.read(count)
