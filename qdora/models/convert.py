"""Write an opened checkpoint as a plain safetensors model folder."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedConfig

from qdora.errors import InputError
from qdora.models.checkpoint import Checkpoint


def write_folder(checkpoint: Checkpoint, folder: Path, dtype: torch.dtype) -> None:
    """Write config, generation config, tokenizer and weights, with floating tensors in `dtype`.

    Holds the whole model in `dtype` once: meant for small models.

    Args:
        checkpoint: an unquantized model (a GGUF file counts: its tensors come dequantized).
        folder: made where missing.
        dtype: storage of the weights.
    Raises: InputError: a value does not fit `dtype`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: _cast(name, tensor, dtype) for name, tensor in checkpoint.tensors()}
    # vLLM and older transformers ask for the format that torch writes here.
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _plain_config(checkpoint.config, dtype).save_pretrained(folder)
    if (generation := checkpoint.generation_config()) is not None:
        generation.save_pretrained(folder)
    if (tokenizer := checkpoint.tokenizer()) is not None:
        tokenizer.save_pretrained(folder)


def _cast(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    smallest, largest = torch.aminmax(tensor)
    magnitude = torch.maximum(-smallest, largest).item()
    # So written that NaN is refused as well.
    if not magnitude <= torch.finfo(dtype).max:
        raise InputError(f"tensor {name}: a magnitude of {magnitude:g} does not fit {dtype}")
    return tensor.to(dtype).contiguous()


def _plain_config(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedConfig:
    values = config.to_dict()
    values.pop("quantization_config", None)
    plain = type(config)(**values)
    plain.dtype = dtype
    return plain
