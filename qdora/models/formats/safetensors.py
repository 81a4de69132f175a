"""Reads a model folder as `save_pretrained` writes it: config.json, safetensors, tokenizer."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import GenerationConfig

from qdora.errors import CheckpointError, InputError, nearest
from qdora.files import parse_object, read_json
from qdora.models.formats import Checkpoint, TensorInfo, read_bytes
from qdora.quant.stored import stored_type

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
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
    """A tensor in a safetensors file: its bytes begin at `start`."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class SafetensorsFolder(Checkpoint):
    """A model folder whose weights are safetensors.

    Attributes:
        stored: the tensors by name, in file order.
    """

    stored: dict[str, StoredTensor]

    @classmethod
    def open(cls, folder: Path, origin: str) -> SafetensorsFolder:
        """Open a model folder and check config and every weight file against index and size.

        Raises:
            CheckpointError: no weights, a shard missing, truncated or at odds with the index.
            InputError: no usable config.json; weights only as pickle; an unknown model type.
        """
        return cls(origin, folder, read_config(folder), _read_headers(folder))

    def names(self) -> list[str]:
        """As `Checkpoint.names`."""
        return list(self.stored)

    def info(self, name: str) -> TensorInfo:
        """As `Checkpoint.info`."""
        return TensorInfo(self.stored[name].shape, self.stored[name].dtype)

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """As `Checkpoint.read`: in the dtype of the file; bytes of other rows are not read."""
        stored = self.stored[name]
        shape, first = stored.shape, 0
        if rows is not None and shape:
            shape, first = (rows.stop - rows.start, *shape[1:]), rows.start * math.prod(shape[1:])
        count = math.prod(shape)
        if count == 0:  # torch does not reinterpret a tensor without elements
            return torch.empty(shape, dtype=stored.dtype)
        size = stored.dtype.itemsize
        raw = torch.from_numpy(read_bytes(stored.path, stored.start + first * size, count * size))
        return raw.view(stored.dtype).view(shape)

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """As `Checkpoint.tokenizer`."""
        return read_tokenizer(self.path)

    def generation_config(self) -> GenerationConfig | None:
        """As `Checkpoint.generation_config`."""
        path = self.path / GENERATION_FILE
        try:
            if path.is_file():
                generation: GenerationConfig = GenerationConfig.from_dict(read_json(path, CheckpointError))
            else:  # early models have such settings among the others
                path = self.path / CONFIG_FILE
                generation = GenerationConfig.from_model_config(read_json(path, CheckpointError))
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be used: {error}") from None
        return generation


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer in a folder; None where there is none.

    Raises: InputError: it cannot be used.
    """
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    try:
        tokenizer: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        tokenizer("a text")  # settings of a wrong type fail no earlier
    except Exception as error:
        raise InputError(f"{folder}: its tokenizer cannot be used: {error}") from error
    return tokenizer


def read_config(folder: Path) -> PreTrainedConfig:
    """The configuration of the model in a folder.

    Raises:
        InputError: no config.json; a model type that `transformers` does not have itself; weights
            quantized by something other than bitsandbytes.
        CheckpointError: config.json is not JSON or holds impossible values.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise _no_config(folder)
    tree = read_json(path, CheckpointError)
    _check_model_type(path, tree)
    _check_quantization(path, tree)
    try:
        config: PreTrainedConfig = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # each configuration class has errors of its own for impossible values
        raise CheckpointError(f"{path}: cannot be used: {error}") from error
    return config


def _check_model_type(path: Path, tree: dict[str, Any]) -> None:
    kind = tree.get("model_type")
    if kind in transformers.CONFIG_MAPPING:
        return
    if "auto_map" in tree:
        raise InputError(
            f"{path}: model_type {kind!r} runs code that comes with the model (auto_map), which is refused; "
            f"allowed: the model types of transformers {transformers.__version__} itself"
        )
    near = nearest(str(kind), transformers.CONFIG_MAPPING)
    hint = f"; did you mean {near!r}?" if near else ""
    raise InputError(
        f"{path}: model_type {kind!r} is unknown to transformers {transformers.__version__}{hint}"
    )


def _check_quantization(path: Path, tree: dict[str, Any]) -> None:
    stated = tree.get("quantization_config", tree.get("compression_config"))
    if isinstance(stated, dict):
        try:
            stored_type(stated)
        except ValueError as error:
            raise InputError(f"{path}: {error}") from None


def _no_config(folder: Path) -> InputError:
    if (folder / "adapter_config.json").is_file():
        return InputError(f"{folder}: holds an adapter and no model; give its base model")
    ggufs = sorted(folder.glob("*.gguf"))
    if ggufs:
        return InputError(f"{folder}: no config.json; to use a GGUF file name it: {ggufs[0]}")
    return InputError(f"{folder}: not a model folder: it has no config.json")


def _read_headers(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of all weight files in a folder."""
    if (folder / SINGLE_FILE).is_file():
        stored = _read_header(folder / SINGLE_FILE)
    elif (folder / INDEX_FILE).is_file():
        stored = _read_sharded(folder)
    else:
        raise _no_weights(folder)
    # Frequencies that early LLaMA exports stored; every model computes them.
    return {name: tensor for name, tensor in stored.items() if not name.endswith("rotary_emb.inv_freq")}


def _read_sharded(folder: Path) -> dict[str, StoredTensor]:
    index = folder / INDEX_FILE
    shard_of = read_json(index, CheckpointError).get("weight_map")
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
    headers = {shard: _read_header(folder / shard) for shard in shards}
    _check_index(index, shard_of, headers)
    return {name: tensor for header in headers.values() for name, tensor in header.items()}


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


def _read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name, in file order.

    Raises: CheckpointError: missing, truncated or corrupt; a dtype that cannot be read.
    """
    try:
        with safe_open(path, framework="pt"):  # checks the header against the size of the file
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = parse_object(file.read(length), str(path), CheckpointError)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: truncated or corrupt safetensors file: {error}") from None
    header.pop("__metadata__", None)
    stored = {}
    for name, entry in header.items():
        dtype = _DTYPES.get(str(entry["dtype"]))
        if dtype is None:
            raise CheckpointError(f"{path}: tensor {name}: dtype {entry['dtype']} cannot be read")
        start = 8 + length + entry["data_offsets"][0]
        stored[name] = StoredTensor(path, dtype, tuple(entry["shape"]), start)
    return dict(sorted(stored.items(), key=lambda item: item[1].start))


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


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
