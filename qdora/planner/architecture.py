"""The architecture of a base model: what its memory follows from, without its weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from huggingface_hub import hf_hub_download

from qdora.config import ModelConfig
from qdora.config_file import SHIPPED, find_shipped, shipped_names
from qdora.errors import InputError
from qdora.files import path_exists, read_json
from qdora.models.build import build_architecture
from qdora.models.formats import Checkpoint
from qdora.models.formats.safetensors import read_config
from qdora.models.load import compute_dtype
from qdora.models.sources import PREFIX, is_hub_id, local_path, open_checkpoint
from qdora.planner.report import StepRecord
from qdora.quant import Quantization
from qdora.training.layers import decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Architecture:
    """A base model as far as memory goes.

    Attributes:
        config: its transformers configuration.
        compute: dtype that it computes in.
        stored: dtype of the weights in its checkpoint.
        quantization: of the decoder's linear layers; `none` leaves them as stored.
    """

    config: PreTrainedConfig
    compute: torch.dtype
    stored: torch.dtype
    quantization: Quantization

    @property
    def depth(self) -> int:
        """Decoder layers."""
        return int(self.config.get_text_config().num_hidden_layers)

    @cached_property
    def layers_alike(self) -> bool:
        """As `same_layers` of the model; found once for all estimates of it."""
        return same_layers(self.build())

    @cached_property
    def idle_steps(self) -> dict[str, StepRecord]:
        """What estimates of it share; filled by them."""
        return {}

    def build(self, depth: int | None = None) -> PreTrainedModel:
        """The model on the meta device, nothing trainable, with so many decoder layers; with all where None.

        Raises: InputError: not a causal language model, or one with layers that the format cannot hold.
        """
        config = copy.deepcopy(self.config)
        if depth is not None:
            text = config.get_text_config()
            text.num_hidden_layers = depth
            if getattr(text, "layer_types", None):
                text.layer_types = text.layer_types[:depth]
        return build_architecture(config, self.compute, self.quantization, self.stored)


def same_layers(model: PreTrainedModel) -> bool:
    """Whether every decoder layer has the same tensors, trainable or not."""
    layers = decoder_layers(model)
    signatures = [
        [(name, t.shape, t.dtype, t.requires_grad) for name, t in (*x.named_parameters(), *x.named_buffers())]
        for x in layers
    ]
    depth = model.config.get_text_config().num_hidden_layers
    return len(layers) == depth and all(one == signatures[0] for one in signatures)


def find_architecture(model: ModelConfig, folder: str | None, device: Literal["cpu", "cuda"]) -> Architecture:
    """The architecture of a configured model; its weights are neither needed nor read.

    Looked for in `folder`, at `model.path`, among the architectures that ship, and on the hub, from which
    only config.json is fetched.

    Args:
        folder: with a config.json, or `qdora:models/NAME`; None where `model.path` says which model.
        device: what the run computes on.
    Raises: InputError: no configuration found, or one that is not supported.
    """
    config, stored = _find_config(model, folder)
    # There is no GPU to ask: bfloat16 is what every one since Ampere multiplies natively.
    auto = model.dtype == "auto" and device == "cuda"
    compute = torch.bfloat16 if auto else compute_dtype(model.dtype, torch.device("cpu"))
    return _architecture(config, stored, model, compute)


def architecture_of(checkpoint: Checkpoint, model: ModelConfig, compute: torch.dtype) -> Architecture:
    """The architecture of an opened checkpoint, as a run with this `model` section loads it."""
    return _architecture(checkpoint.config, _stored_dtype(checkpoint), model, compute)


def _stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    return next(f.dtype for name in checkpoint.names() if len((f := checkpoint.info(name)).shape) > 1)


def _architecture(
    config: PreTrainedConfig, stored: torch.dtype, model: ModelConfig, compute: torch.dtype
) -> Architecture:
    quantization = Quantization.of(model)
    stated = getattr(config, "quantization_config", None)
    if stated is not None and quantization.name != "none":
        double = bool(dict(stated).get("bnb_4bit_use_double_quant", False))
        quantization = replace(quantization, block_size=64, double_quantization=double)
    return Architecture(config, compute, stored, quantization)


def _find_config(model: ModelConfig, folder: str | None) -> tuple[PreTrainedConfig, torch.dtype]:
    """A transformers configuration, and the dtype of the stored weights."""
    if folder is not None:
        return _read_folder(local_path(str(find_shipped(folder))))
    path = local_path(model.path)
    if path.is_dir():
        return _read_folder(path)
    if model.path.startswith(PREFIX) or path_exists(path) or not is_hub_id(model.path):
        checkpoint = open_checkpoint(model.path, model.revision)
        return checkpoint.config, _stored_dtype(checkpoint)
    shipped = shipped_architectures()
    if model.path in shipped:
        return _read_folder(find_shipped(shipped[model.path]))
    try:
        downloaded = hf_hub_download(model.path, "config.json", revision=model.revision)
    except Exception as error:  # network libraries raise errors of their own through this call
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"model {model.path!r}: its config.json cannot be had from the hub ({reason}); "
            f"give a folder with one as --architecture, for example {next(iter(shipped.values()))}"
        ) from None
    return _read_folder(Path(downloaded).parent)


@cache
def shipped_architectures() -> dict[str, str]:
    """The architectures that ship, `qdora:models/NAME`, by the hub id of the model."""
    folders = [(SHIPPED + name, path) for name, path in shipped_names().items() if path.is_dir()]
    return {str(read_json(path / "config.json")["_name_or_path"]): name for name, path in folders}


def _read_folder(folder: Path) -> tuple[PreTrainedConfig, torch.dtype]:
    config = read_config(folder)
    return config, config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16
