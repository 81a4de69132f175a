"""A base model in a folder, as `save_pretrained` writes it: config.json, safetensors, tokenizer."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from qdora.errors import CheckpointError, InputError
from qdora.models.checkpoint import Checkpoint, TensorFacts
from qdora.models.folder_config import read_config, read_json
from qdora.models.safetensors_file import StoredTensor, read_header, read_tensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


@dataclass(frozen=True)
class SafetensorsFolder(Checkpoint):
    """A model folder whose weights are safetensors, in one file or in shards.

    Attributes:
        places: where each tensor lies, in file order.
    """

    places: dict[str, StoredTensor]

    @classmethod
    def open(cls, folder: Path, origin: str) -> SafetensorsFolder:
        """Open a model folder and check config and every weight file against index and size.

        Raises:
            CheckpointError: no weights, a shard missing, truncated or at odds with the index.
            InputError: no usable config.json; weights only as pickle; an unknown model type.
        """
        config = read_config(folder)
        return cls(origin, folder, config, _places(folder))

    def names(self) -> list[str]:
        return list(self.places)

    def facts(self, name: str) -> TensorFacts:
        return TensorFacts(self.places[name].shape, self.places[name].dtype)

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        return read_tensor(self.places[name], rows)

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        if not any((self.path / name).is_file() for name in _TOKENIZER_FILES):
            return None
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                self.path, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:
            raise InputError(f"{self.path}: its tokenizer cannot be read: {error}") from error
        return tokenizer

    def generation_config(self) -> GenerationConfig | None:
        path = self.path / "generation_config.json"
        if not path.is_file():
            return None
        try:
            generation: GenerationConfig = GenerationConfig.from_dict(read_json(path))
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be used: {error}") from None
        return generation


def _places(folder: Path) -> dict[str, StoredTensor]:
    if (folder / SINGLE_FILE).is_file():
        places = read_header(folder / SINGLE_FILE)
    elif (folder / INDEX_FILE).is_file():
        places = _sharded(folder)
    else:
        raise _no_weights(folder)
    # Frequencies that early LLaMA exports stored; every model computes them.
    return {name: place for name, place in places.items() if not name.endswith("rotary_emb.inv_freq")}


def _sharded(folder: Path) -> dict[str, StoredTensor]:
    index = folder / INDEX_FILE
    shard_of = read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise CheckpointError(f"{index}: has no weight_map")
    shards = sorted({str(shard) for shard in shard_of.values()})
    for shard in shards:
        # A name with a path in it could lead anywhere on the disk.
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{index}: {shard!r} is not the name of a safetensors file beside it")
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise CheckpointError(f"{folder}: {len(missing)} of {len(shards)} shards missing: {_some(missing)}")
    headers = {shard: read_header(folder / shard) for shard in shards}
    _check_index(index, shard_of, headers)
    return {name: place for header in headers.values() for name, place in header.items()}


def _check_index(index: Path, shard_of: dict[str, str], headers: dict[str, dict[str, StoredTensor]]) -> None:
    counts = Counter(name for header in headers.values() for name in header)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        raise CheckpointError(f"{index.parent}: {_some(twice)} stored in more than one shard")
    for name, shard in shard_of.items():
        if name not in headers[shard]:
            raise CheckpointError(f"{index}: places {name} in {shard}, which does not hold it")
    unlisted = [name for name in counts if name not in shard_of]
    if unlisted:
        raise CheckpointError(f"{index}: does not list {_some(unlisted)}, which a shard holds")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _no_weights(folder: Path) -> InputError:
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        return InputError(
            f"{folder}: has its weights only as pickle ({_some(pickles)}), which can run code when loaded "
            "and is refused; convert it to safetensors first (save_pretrained does)"
        )
    ggufs = sorted(folder.glob("*.gguf"))
    if ggufs:
        return InputError(f"{folder}: no safetensors weights; to use a GGUF file name it: {ggufs[0]}")
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    found = f"; found {_some(others)}" if others else ""
    return CheckpointError(f"{folder}: no weights: neither {SINGLE_FILE} nor {INDEX_FILE} is there{found}")
