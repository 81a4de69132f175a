"""Every format of a frozen weight: its bits, its tiles, and that nothing elsewhere asks which it is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt, Params4bit
from scipy.stats import norm
from torch import nn

from qdora.adapters.inject import adapted_layers, count_parameters, inject
from qdora.config import AdapterConfig, QuantizationName
from qdora.errors import InputError
from qdora.quant import QUANTIZATIONS, Quantization
from qdora.quant import base as tiling
from qdora.quant.normal_float import normal_float
from qdora.quant.stored import adopt_linear

PACKAGE = Path(__file__).parents[3] / "qdora"


def weight_of(shape: tuple[int, int]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def test_the_registry_is_what_the_configuration_allows():
    """Catches: a format that can be configured and not built, or the other way round."""
    assert set(QUANTIZATIONS) == set(get_args(QuantizationName))
    assert all(kind.quantization == name for name, kind in QUANTIZATIONS.items())


def test_nothing_outside_the_room_asks_for_a_format():
    """Catches: a type check by which a new format would have to be known elsewhere too."""
    names = "|".join(kind.__name__ for kind in QUANTIZATIONS.values())
    check = re.compile(rf"isinstance\([^()]*(?:\([^()]*\))?[^()]*\b(?:{names}|BlockwiseWeight)\b")
    hits = [
        f"{path.relative_to(PACKAGE)}: {match.group()}"
        for path in PACKAGE.rglob("*.py")
        if path.parent.name != "quant"
        for match in check.finditer(path.read_text(encoding="utf-8"))
    ]
    assert not hits


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", [(48, 64), (70, 96), (33, 100), (300, 576)])
def test_fp4_has_the_bits_of_bitsandbytes(shape, double):
    """Catches: another code book or block order than bitsandbytes' FP4 has."""
    w_OI = weight_of(shape)
    ours = Quantization("fp4", double_quantization=double).from_dense(w_OI)
    packed, state = bnb.quantize_4bit(w_OI, blocksize=64, compress_statistics=double, quant_type="fp4")
    assert torch.equal(ours.packed.view(-1), packed.view(-1))
    state.shape = torch.Size((1, w_OI.numel()))  # in 2D its AVX512 kernel errs where rows are no whole blocks
    assert torch.equal(ours.dense(), bnb.dequantize_4bit(packed, state).float().view(shape))


@pytest.mark.parametrize("shape", [(48, 64), (70, 96), (33, 101)])
def test_int8_has_the_bits_of_bitsandbytes(shape):
    """Catches: another code book or block size than bitsandbytes' blockwise 8 bits have."""
    w_OI = weight_of(shape)
    ours = Quantization("int8", double_quantization=False).from_dense(w_OI)
    codes, state = bnb.quantize_blockwise(w_OI, blocksize=64)
    assert torch.equal(ours.packed, codes)
    assert torch.equal(ours.dense(), bnb.dequantize_blockwise(codes, state))


def test_nf4_comes_out_of_the_construction_of_the_others():
    """Catches: quantiles of another spacing or outermost value than QLoRA's, halves of the wrong size."""
    table = torch.tensor(normal_float(4), dtype=torch.float64)
    assert (table - bnb.get_4bit_type("nf4", device="cpu").double()).abs().max() < 1e-6


@pytest.mark.parametrize(("bits", "outermost"), [(2, 41 / 48), (3, 209 / 224), (4, 929 / 960)])
def test_the_code_books_are_quantiles_of_a_normal_distribution(bits, outermost):
    """Catches: a code book without an exact zero, with its longer half on the negative side, out of order, or
    with the outermost quantile of another number of bits."""
    table = normal_float(bits)
    zero = 2 ** (bits - 1) - 1
    assert len(table) == 2**bits
    assert table[zero] == 0.0
    assert (table[0], table[-1]) == (-1.0, 1.0)
    probabilities = norm.cdf(np.array(table) * norm.ppf(outermost))
    below, above = probabilities[: zero + 1], probabilities[zero:]
    assert np.allclose(np.diff(below), (outermost - 0.5) / zero, rtol=1e-9)
    assert np.allclose(np.diff(above), (outermost - 0.5) / (zero + 1), rtol=1e-9)


@pytest.mark.parametrize("name", ["nf3", "nf2"])
def test_each_value_gets_the_nearest_code_of_its_block(name):
    """Catches: a value rounded to its second nearest code, or by the scale of another block; a short last
    block or a block of zeros that becomes NaN."""
    values = torch.randn(33 * 101, generator=torch.Generator().manual_seed(0))
    values[64:128] = 0
    values[128:192] *= 1e-30
    weight = Quantization(name, double_quantization=False).from_dense(values.view(33, 101))
    table = torch.tensor(normal_float(weight.bits), dtype=torch.float64)
    for start in range(0, values.numel(), 64):
        block = values[start : start + 64].double()
        scale = block.abs().max()
        nearest = (block[:, None] - scale * table).abs().min(dim=1).values
        got = weight.dense().view(-1)[start : start + 64].double()
        assert torch.allclose((block - got).abs(), nearest, rtol=1e-5, atol=1e-7 * float(scale))
    assert int(weight.packed.max()) == 2**weight.bits - 1
    # A doubly quantized scale of zero comes back as another number: the codes must be those of zero.
    assert not Quantization(name).from_dense(values.view(33, 101)).dense().view(-1)[64:128].any()


@pytest.mark.parametrize(
    ("name", "bound"),
    [("nf4", 0.11), ("fp4", 0.14), ("int8", 0.015), ("nf3", 0.22), ("nf2", 0.6), ("none", 0.0)],
)
def test_the_error_is_that_of_the_format(name, bound):
    """Catches: codes read with the table of another format."""
    w_OI = weight_of((64, 256))
    error = (Quantization(name).from_dense(w_OI).dense() - w_OI).norm() / w_OI.norm()
    assert bound / 2 <= float(error) <= bound


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_tiles_and_scaled_rows_are_the_full_weight(name, monkeypatch):
    """Catches: a tile that begins inside a block, a row scale that is lost or another row's."""
    s_O = torch.randn(24)
    for inputs in (128, 96):  # rows of whole blocks, and others
        weight = Quantization(name).from_dense(weight_of((24, inputs)))
        full = weight.dense()
        monkeypatch.setitem(tiling.TILE_BYTES, "cpu", 4 * inputs * 5)
        scaled = torch.cat([tile.clone() for _, tile in weight.tiles(torch.float32, s_O)])
        assert torch.equal(torch.cat([tile.clone() for _, tile in weight.tiles(torch.float32)]), full)
        assert torch.allclose(scaled, full * s_O[:, None], rtol=1e-6, atol=1e-7)
        monkeypatch.undo()


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_a_quantized_weight_counts_as_its_architecture_does(name):
    """Catches: packed bytes, or scales, counted as parameters."""
    model = nn.ModuleDict({"q_proj": nn.Linear(64, 48, bias=True), "other": nn.Linear(8, 8)})
    before = sum(p.numel() for p in model.parameters())
    report = inject(model, AdapterConfig(r=4, targets="q_proj"), quantization=name)
    assert report.total - report.trainable == before == count_parameters(model) - report.trainable


def linear_4bit(quant_type: str, *, double: bool, inputs: int = 128) -> Linear4bit:
    layer = Linear4bit(inputs, 64, bias=True, quant_type=quant_type, compute_dtype=torch.float32)
    layer.weight = Params4bit(
        weight_of((64, inputs)), requires_grad=False, quant_type=quant_type, compress_statistics=double
    )
    return layer.to("cpu")


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_4_bit_layer_of_bitsandbytes_keeps_its_bytes(quant_type, double):
    """Catches: 4-bit codes quantized again as if they were weights; statistics lost on the way."""
    theirs = linear_4bit(quant_type, double=double)
    x = torch.randn(5, 128)
    model = nn.ModuleDict({"q_proj": theirs, "other": nn.Linear(128, 8)})
    expected, packed = theirs(x).detach().clone(), theirs.state_dict()["weight"].clone()
    inject(model, AdapterConfig(r=4, targets="q_proj", dtype="float32"))
    (layer,) = adapted_layers(model).values()
    assert layer.base.quantization == quant_type
    assert torch.equal(layer.base.packed.view(-1), packed.view(-1))
    assert torch.allclose(layer(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["int8", "codes", "own forward"])
def test_other_quantized_layers_are_refused_by_name(kind):
    """Catches: int8 codes taken for weights: the logits were wrong by 139%."""
    if kind == "int8":
        layer = Linear8bitLt(128, 64, has_fp16_weights=False)
        layer.weight.data = torch.zeros(64, 128, dtype=torch.int8)
    else:
        kind_of = type("FP8Linear", (nn.Linear,), {} if kind == "codes" else {"forward": lambda self, x: x})
        layer = kind_of(128, 64)
        if kind == "codes":
            layer.weight = nn.Parameter(torch.zeros(64, 128).to(torch.float8_e4m3fn), requires_grad=False)
    model = nn.ModuleDict({"q_proj": layer})
    with pytest.raises(InputError, match=rf"q_proj is a {type(layer).__name__} with a weight of"):
        inject(model, AdapterConfig(r=4, targets="q_proj"))
    assert model["q_proj"] is layer


def test_a_plain_layer_is_left_to_the_caller():
    """Catches: a plain layer taken for a quantized one."""
    assert adopt_linear(nn.Linear(4, 4), "plain") is None
