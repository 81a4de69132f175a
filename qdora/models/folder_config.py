"""The config.json of a model folder, read without ever running code that comes with the model."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from qdora.errors import CheckpointError, InputError, suggest

_QUANTIZERS = ("bitsandbytes",)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises: CheckpointError: unreadable, not JSON or not an object.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(tree).__name__}")
    return tree


def read_config(folder: Path) -> PreTrainedConfig:
    """The configuration of the model in a folder.

    Raises:
        InputError: no config.json; a model type that `transformers` does not have itself; weights
            quantized by something other than bitsandbytes.
        CheckpointError: config.json is not JSON or holds impossible values.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise _no_config(folder)
    tree = read_json(path)
    _check_model_type(path, tree)
    _check_quantization(path, tree)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # each configuration class has errors of its own for impossible values
        raise CheckpointError(f"{path}: cannot be used: {error}") from error
    return config


def _check_model_type(path: Path, tree: dict[str, Any]) -> None:
    kind = tree.get("model_type")
    if kind in CONFIG_MAPPING:
        return
    if "auto_map" in tree:
        raise InputError(
            f"{path}: model_type {kind!r} runs code that comes with the model (auto_map), which is refused; "
            f"allowed: the model types of transformers {transformers.__version__} itself"
        )
    near = difflib.get_close_matches(str(kind), list(CONFIG_MAPPING), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise InputError(
        f"{path}: model_type {kind!r} is unknown to transformers {transformers.__version__}{hint}"
    )


def _check_quantization(path: Path, tree: dict[str, Any]) -> None:
    quantization = tree.get("quantization_config")
    if not isinstance(quantization, dict):
        return
    # Folders written before quant_method existed are bitsandbytes ones.
    method = str(quantization.get("quant_method", "bitsandbytes"))
    if method not in _QUANTIZERS:
        raise InputError(
            f"{path}: weights quantized by {method!r} cannot be read; {suggest(method, _QUANTIZERS)} "
            "(or give the unquantized model)"
        )


def _no_config(folder: Path) -> InputError:
    if (folder / "adapter_config.json").is_file():
        return InputError(f"{folder}: holds an adapter and no model; give its base model")
    ggufs = sorted(folder.glob("*.gguf"))
    if ggufs:
        return InputError(f"{folder}: no config.json; to use a GGUF file name it: {ggufs[0]}")
    return InputError(f"{folder}: not a model folder: it has no config.json")
