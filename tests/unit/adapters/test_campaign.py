"""The campaign's stage against PEFT, in short: random architectures, adapters and settings."""

from __future__ import annotations

import pytest
import torch

from qdora.adapters.layer import AdaptedLinear
from qdora.adapters.lora import LoraUpdate
from qdora.adapters.magnitude import Magnitude, NormCache
from tools.campaign import architectures


def test_random_architectures_and_adapters_equal_peft(tmp_path):
    """Catches: outputs, gradients, merged weights or files that are not PEFT's in a combination that no test
    names: sizes, biases, ties, key heads, zero rows, patterns, starts, 4-bit and dense layers in one."""
    report = architectures.run(12, 0, tmp_path)
    assert report.tried == 12
    assert not report.faults, report


def rounded_factors(self, factors=LoraUpdate.factors):
    given = factors(self)
    return given._replace(a_RI=given.a_RI.bfloat16().to(given.a_RI.dtype))


BUGS = {
    "a factor is rounded": (LoraUpdate, "factors", rounded_factors),
    "a norm is rounded": (
        NormCache,
        "norm",
        lambda self, f, norm=NormCache.norm: norm(self, f).bfloat16().double(),
    ),
    "m is rounded": (Magnitude, "load", lambda self, m, load=Magnitude.load: load(self, m.bfloat16())),
    "the bias is scaled": (
        AdaptedLinear,
        "forward",
        lambda self, x, forward=AdaptedLinear.forward: (
            forward(self, x) + (0 if self.bias is None else self.bias)
        ),
    ),
    "the merge is rounded": (
        AdaptedLinear,
        "merged",
        lambda self, dtype, merged=AdaptedLinear.merged: merged(self, torch.bfloat16).to(dtype),
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_the_stage_finds_a_fault(tmp_path, monkeypatch, bug):
    """Catches: a stage that calls everything equal."""
    monkeypatch.setattr(*BUGS[bug])
    assert architectures.run(4, 0, tmp_path).faults
