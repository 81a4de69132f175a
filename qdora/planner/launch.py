"""The architecture that an estimate is made for: from a configuration, a folder or the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import hf_hub_download
from transformers import PreTrainedConfig

from qdora.config import ModelConfig
from qdora.errors import InputError
from qdora.files import read_json
from qdora.models.build import Quantization
from qdora.models.formats.safetensors import read_config
from qdora.models.hub import is_hub_id, open_checkpoint
from qdora.models.load import compute_dtype
from qdora.models.packaged import PREFIX
from qdora.planner.simulate import Architecture

SHIPPED = "models"
"""Folder beside the configuration files, with a folder for each architecture that ships."""


def find_architecture(
    model: ModelConfig, folder: str | None, configuration: Path, device: Literal["cpu", "cuda"]
) -> Architecture:
    """The architecture of a configured model; its weights are neither needed nor read.

    Looked for in `folder`, at `model.path`, among the architectures that ship beside the configuration
    file, and on the hub, where only config.json is fetched.

    Args:
        folder: with a config.json; None where `model.path` says which model.
        configuration: the file of the run.
        device: what the run computes on.
    Raises: InputError: no configuration found, or one that is not supported.
    """
    config, stored = _find_config(model, folder, configuration)
    quantization = None
    if model.base == "nf4":
        quantization = Quantization(model.block_size, model.double_quantization)
        stated = getattr(config, "quantization_config", None)
        if stated is not None:
            quantization = Quantization(64, bool(dict(stated).get("bnb_4bit_use_double_quant", False)))
    # There is no GPU to ask: bfloat16 is what every one since Ampere multiplies natively.
    auto = model.dtype == "auto" and device == "cuda"
    compute = torch.bfloat16 if auto else compute_dtype(model.dtype, torch.device("cpu"))
    return Architecture(config, compute, stored, quantization)


def _find_config(
    model: ModelConfig, folder: str | None, configuration: Path
) -> tuple[PreTrainedConfig, torch.dtype]:
    path = Path(folder if folder is not None else model.path).expanduser()
    if folder is not None or path.is_dir():
        return _of_folder(path)
    if model.path.startswith(PREFIX) or path.exists() or not is_hub_id(model.path):
        checkpoint = open_checkpoint(model.path, model.revision)
        stored = next(f.dtype for name in checkpoint.names() if len((f := checkpoint.info(name)).shape) > 1)
        return checkpoint.config, stored
    shipped = shipped_architectures(configuration)
    if model.path in shipped:
        return _of_folder(shipped[model.path])
    try:
        downloaded = hf_hub_download(model.path, "config.json", revision=model.revision)
    except Exception as error:  # network libraries raise errors of their own through this call
        known = {name: str(place) for name, place in shipped.items()}
        raise InputError(
            f"model {model.path!r}: its config.json cannot be had from the hub ({_first_line(error)}); "
            f"give a folder with one as --architecture{_example(known)}"
        ) from None
    return _of_folder(Path(downloaded).parent)


def shipped_architectures(configuration: Path) -> dict[str, Path]:
    """Folders with an architecture near a configuration file, by the hub id of the model."""
    for parent in (configuration.resolve().parent, configuration.resolve().parent.parent):
        found = {
            str(read_json(file).get("_name_or_path", file.parent.name)): file.parent
            for file in sorted((parent / SHIPPED).glob("*/config.json"))
        }
        if found:
            return found
    return {}


def _of_folder(folder: Path) -> tuple[PreTrainedConfig, torch.dtype]:
    config = read_config(folder)
    stored = getattr(config, "dtype", None)
    if isinstance(stored, str):
        stored = getattr(torch, stored, None)
    return config, stored if isinstance(stored, torch.dtype) else torch.bfloat16


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _example(shipped: dict[str, str]) -> str:
    return f", for example {next(iter(shipped.values()))}" if shipped else ""
