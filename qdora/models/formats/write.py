"""Writes a model folder that transformers 4 and 5 and vLLM load: config.json, safetensors, tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from transformers import GenerationConfig

from qdora.errors import InputError
from qdora.files import read_json, write_json
from qdora.models.formats.safetensors import CONFIG_FILE, GENERATION_FILE, INDEX_FILE, SINGLE_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

SHARD_BYTES = 512 << 20
"""Largest shard that is written; it is collected in memory first, so this bounds the memory of an export."""

_OF_LOADING = ("is_local", "local_files_only")
"""What a tokenizer keeps of the call that loaded it."""


def write_model_folder(
    folder: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    config: PreTrainedConfig,
    dtype: torch.dtype,
    generation_config: GenerationConfig | None,
    tokenizer: PreTrainedTokenizerBase | None,
    quantization: Mapping[str, Any] | None = None,
) -> None:
    """Write a model so that transformers and vLLM load it; not atomic by itself.

    Args:
        folder: made where missing.
        tensors: on the CPU and in `dtype`, see `cast_checked`; at most one shard of them is kept in memory.
        config: written with `dtype`; not changed.
        quantization: of the tensors; the configuration's own is left out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_settings(folder, config, dtype, generation_config, tokenizer, quantization)
    _write_shards(folder, tensors)


def write_settings(
    folder: Path,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    generation_config: GenerationConfig | None,
    tokenizer: PreTrainedTokenizerBase | None,
    quantization: Mapping[str, Any] | None = None,
) -> None:
    """Write all of a model folder but its weights.

    Generation settings are written as they are, so that every client does what it does with the base model.
    `save_pretrained` refuses some that are published, and that `from_pretrained` takes: a temperature without
    `do_sample`, which transformers ignores and vLLM follows.

    Args: as `write_model_folder`; the folder is there.
    Raises: InputError: the tokenizer cannot be saved.
    """
    config = deepcopy(config)
    config.dtype = dtype
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    settings = with_version_4_names(json.loads(config.to_json_string()))
    if quantization is not None:
        settings["quantization_config"] = dict(quantization)
    write_json(folder / CONFIG_FILE, settings)
    if generation_config is not None:
        generation_config.to_json_file(folder / GENERATION_FILE, keys_to_pop=["compile_config"])
    if tokenizer is not None:
        save_tokenizer(folder, tokenizer)


def save_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write a tokenizer with its chat template, as `from_pretrained` of transformers 4 and 5 takes it.

    Raises: InputError: it cannot be saved.
    """
    try:
        tokenizer.save_pretrained(folder)
    except OSError:
        raise  # a full disk, say
    except Exception as error:  # each class of tokenizers has errors of its own
        raise InputError(f"{tokenizer.name_or_path}: its tokenizer cannot be saved: {error}") from error
    path = folder / "tokenizer_config.json"
    settings = {key: value for key, value in read_json(path).items() if key not in _OF_LOADING}
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    write_json(path, settings)


def with_version_4_names(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of config.json with the names that readers of version 4 know beside those of version 5.

    Version 4 of transformers, and servers that follow it, read `rope_theta`, `rope_scaling`, `torch_dtype`;
    what they lack they take from a default without a word. Version 5 reads these too, to the same end.

    Source: `PreTrainedConfig.convert_rope_params_to_dict` of transformers 5.23, `LlamaConfig` of 4.57.
    """
    settings = {
        key: with_version_4_names(value) if isinstance(value, dict) and key.endswith("_config") else value
        for key, value in settings.items()
    }
    if "dtype" in settings:
        settings["torch_dtype"] = settings["dtype"]
    rope = settings.get("rope_parameters")
    if not isinstance(rope, dict):
        return settings
    by_attention = {key: value for key, value in rope.items() if isinstance(value, dict)}
    if by_attention:
        # Gemma 3: the layers with a window have a frequency of their own.
        if local := by_attention.get("sliding_attention"):
            settings["rope_local_base_freq"] = local["rope_theta"]
        rope = by_attention.get("full_attention", {})
    own_keys = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    scaling = {key: value for key, value in rope.items() if key not in own_keys}
    scales = scaling.get("rope_type", "default") != "default"
    return settings | own_keys | {"rope_scaling": scaling if scales else None}


def cast_checked(name: str, tensor: torch.Tensor, dtype: torch.dtype, hint: str = "") -> torch.Tensor:
    """The tensor in `dtype`, contiguous, on the CPU.

    Raises: InputError: a value is not finite in `dtype`; `hint` ends the message.
    """
    tensor = tensor.detach()
    cast = tensor.to("cpu", dtype)
    if not torch.isfinite(cast).all():
        if not torch.isfinite(tensor).all():
            kind = "NaN" if tensor.isnan().any() else "infinite values"
            raise InputError(f"{name}: holds {kind}, in whatever dtype it is written")
        largest = float(tensor.float().abs().max())
        raise InputError(
            f"{name}: a value of magnitude {largest:g} does not fit {dtype}, whose largest is "
            f"{torch.finfo(dtype).max:g}{hint}"
        )
    return cast.contiguous()


def _write_shards(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write tensors, in their order, as one file or as shards with an index."""
    names_of: list[list[str]] = []
    total = 0
    for shard in _collect_shards(tensors):
        # vLLM and older transformers ask for the format that torch writes here.
        save_file(shard, folder / f"part-{len(names_of)}", {"format": "pt"})
        total += sum(tensor.nbytes for tensor in shard.values())
        names_of.append(list(shard))
        shard.clear()  # while the next one is collected this name still refers to it
    if len(names_of) == 1:
        (folder / "part-0").rename(folder / SINGLE_FILE)
        return
    weight_map = {}
    for number, names in enumerate(names_of):
        file_name = f"model-{number + 1:05d}-of-{len(names_of):05d}.safetensors"
        (folder / f"part-{number}").rename(folder / file_name)
        weight_map.update(dict.fromkeys(names, file_name))
    write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _collect_shards(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard
