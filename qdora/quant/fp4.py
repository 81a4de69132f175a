"""Frozen weights in a 4-bit float, by bitsandbytes' kernels."""

from __future__ import annotations

from qdora.quant.nf4 import NF4Weight


class FP4Weight(NF4Weight):
    """A frozen (out, in) weight in bitsandbytes' FP4: sign, two bits of exponent, one of mantissa.

    Its relative error is about 1.3 times NF4's on normally distributed weights.
    """

    quantization = "fp4"
