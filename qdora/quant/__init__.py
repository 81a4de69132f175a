"""Formats of the frozen weights, one file each, and their registry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from qdora.config import ModelConfig, QuantizationName
from qdora.quant.base import FrozenWeight
from qdora.quant.dense import DenseWeight
from qdora.quant.fp4 import FP4Weight
from qdora.quant.int8 import Int8Weight
from qdora.quant.nf4 import NF4Weight
from qdora.quant.normal_float import NF2Weight, NF3Weight

QUANTIZATIONS: Mapping[QuantizationName, type[FrozenWeight]] = {
    "nf4": NF4Weight,
    "fp4": FP4Weight,
    "int8": Int8Weight,
    "nf3": NF3Weight,
    "nf2": NF2Weight,
    "none": DenseWeight,
}


@dataclass(frozen=True)
class Quantization:
    """A format with its options.

    Attributes:
        name: row of the registry.
        block_size: values that share one scale.
        double_quantization: quantize the scales as well (QLoRA, arXiv:2305.14314 §3).
    """

    name: QuantizationName = "nf4"
    block_size: int = 64
    double_quantization: bool = True

    @classmethod
    def of(cls, config: ModelConfig) -> Quantization:
        """That of the configured base model."""
        return cls(config.quantization, config.block_size, config.double_quantization)

    def on_meta(self, shape: tuple[int, int], dtype: torch.dtype) -> FrozenWeight:
        """A weight without its bytes; as `FrozenWeight.on_meta`.

        Raises: ValueError: the format cannot hold the shape.
        """
        return QUANTIZATIONS[self.name].on_meta(
            shape, dtype=dtype, block_size=self.block_size, double_quantization=self.double_quantization
        )

    def from_dense(self, w_OI: torch.Tensor) -> FrozenWeight:
        """A floating-point weight in this format, on its device; as it is where that is `none`.

        Raises: ValueError: the format cannot hold the shape.
        """
        if self.name == "none":
            return DenseWeight(w_OI)
        return QUANTIZATIONS[self.name].from_dense(
            w_OI, block_size=self.block_size, double_quantization=self.double_quantization
        )
