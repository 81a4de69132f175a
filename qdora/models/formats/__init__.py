"""The interface to a stored base model: its configuration, its tensors one at a time, its tokenizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from qdora.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase


class TensorInfo(NamedTuple):
    """What a file's header says of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Checkpoint(ABC):
    """A stored base model, opened and checked, with no tensor read yet.

    Attributes:
        origin: what the user typed.
        path: the model folder or the GGUF file.
        config: what `transformers` builds the model from.
    """

    origin: str
    path: Path
    config: PreTrainedConfig

    @property
    def quantization(self) -> dict[str, Any] | None:
        """How the stored weights are quantized (`quantization_config`); None where they are not."""
        stated = getattr(self.config, "quantization_config", None)
        return None if stated is None else dict(stated)

    @abstractmethod
    def names(self) -> list[str]:
        """Tensor names, as `transformers` names parameters, in file order."""

    @abstractmethod
    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of the tensor that `read` returns, without reading it."""

    @abstractmethod
    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """Read a tensor, or consecutive rows of one, to the CPU.

        Args:
            rows: along the first dimension; all where None, and of a scalar.
        Raises: CheckpointError: the file became shorter since it was opened.
        """

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Read name after name, in file order; a tensor is not kept after it was yielded.

        Raises: CheckpointError: as `read`.
        """
        for name in self.names():
            yield name, self.read(name)

    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer stored with the model; None where there is none.

        Raises: InputError: it is there and cannot be used.
        """

    @abstractmethod
    def generation_config(self) -> GenerationConfig | None:
        """The generation defaults stored with the model; None where there are none.

        Raises: CheckpointError: the file is there and cannot be read.
        """


def read_bytes(path: Path, start: int, count: int) -> npt.NDArray[np.uint8]:
    """Bytes `start` to `start + count` of a file.

    Returns: (count,) uint8.
    Raises: CheckpointError: the file ends before, or cannot be read.
    """
    try:
        raw = np.fromfile(path, dtype=np.uint8, count=count, offset=start)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    if raw.size != count:
        raise CheckpointError(f"{path}: truncated: it ends {count - raw.size} bytes too early")
    return raw
