"""The step of a deep model from those of two shallow ones.

Decoder layers are alike.  So at one point of a step, counted in layers from the first or from the last,
every kind of memory grows by the same number of bytes with each further layer of the model; and between
the ends it changes evenly from layer to layer, so that the worst moment is near one of them.  Two depths
give each point's line exactly, and 80 layers cost what 9 do.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from qdora.adapters.inject import inject
from qdora.analysis.memory_model import decoder_layers
from qdora.analysis.memory_parts import Breakdown
from qdora.analysis.memory_step import Launch, StepRecord, record_step
from qdora.config import AdapterConfig
from qdora.models.skeleton import Quantization, architecture_skeleton

K = TypeVar("K")

DEPTHS = (4, 5)
"""Two layers at each end see what no others do: nothing gathered before them, nothing to gather after."""


@dataclass(frozen=True)
class Architecture:
    """A base model as far as memory goes.

    Attributes:
        config: its transformers configuration.
        compute: dtype that it computes in.
        stored: dtype of the weights in its checkpoint.
        quantization: of the decoder's linear layers; None leaves them as stored.
    """

    config: PreTrainedConfig
    compute: torch.dtype
    stored: torch.dtype
    quantization: Quantization | None

    @property
    def depth(self) -> int:
        """Decoder layers."""
        return int(self.config.get_text_config().num_hidden_layers)

    def skeleton(self, depth: int | None = None) -> PreTrainedModel:
        """The structure on the meta device, with so many decoder layers; with all where None.

        Raises: InputError: not a causal language model, or one with layers that NF4 cannot hold.
        """
        config = copy.deepcopy(self.config)
        if depth is not None:
            text = config.get_text_config()
            text.num_hidden_layers = depth
            if getattr(text, "layer_types", None):
                text.layer_types = text.layer_types[:depth]
        return architecture_skeleton(config, self.compute, self.quantization, self.stored)


def record(architecture: Architecture, launch: Launch) -> StepRecord:
    """A step of the whole model, from two shallow ones where its layers are alike.

    Raises: InputError: as `record_step`.
    """
    if architecture.depth <= max(DEPTHS) or not layers_alike(architecture, launch.adapter):
        return record_step(architecture.skeleton(), launch)
    first, second = (record_step(architecture.skeleton(depth), launch) for depth in DEPTHS)
    return _extended(first, second, architecture.depth)


def layers_alike(architecture: Architecture, adapter: AdapterConfig) -> bool:
    """Whether every decoder layer has the same tensors, and the same adapters on them.

    Raises: InputError: the adapter does not fit the model.
    """
    kinds = getattr(architecture.config.get_text_config(), "layer_types", None) or ()
    model = architecture.skeleton()
    inject(model, adapter)
    signatures = [_signature(layer) for layer in decoder_layers(model)]
    same = len(signatures) == architecture.depth and all(s == signatures[0] for s in signatures)
    return same and len(set(kinds)) < 2


def _signature(layer: nn.Module) -> list[tuple[object, ...]]:
    tensors = [*layer.named_parameters(), *layer.named_buffers()]
    return [(name, tuple(t.shape), t.dtype, t.requires_grad) for name, t in tensors]


def _extended(first: StepRecord, second: StepRecord, depth: int) -> StepRecord:
    """To `depth` layers; the second record is a layer deeper, and may have stretches of that layer alone."""
    peaks = {
        stretch: Breakdown.of(_line(dict(peak), dict(second.peaks[stretch]), depth))
        for stretch, peak in first.peaks.items()
    }
    at_rest = Breakdown.of(_line(dict(first.at_rest), dict(second.at_rest), depth))
    shards = Breakdown.of(_line(dict(first.shards), dict(second.shards), depth))
    return StepRecord(peaks, at_rest, shards, _line(first.exchanged, second.exchanged, depth))


def _line(first: Mapping[K, int], second: Mapping[K, int], depth: int) -> dict[K, int]:
    return {key: value + (second[key] - value) * (depth - DEPTHS[0]) for key, value in first.items()}
