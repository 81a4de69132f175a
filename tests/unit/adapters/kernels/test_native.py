"""The functions for CPUs against the operators of torch and bitsandbytes, and where they are left alone."""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from qdora.adapters import kernels, tiles
from qdora.adapters.kernels import native, reference
from qdora.adapters.magnitude import factored_norm
from qdora.quant import QUANTIZATIONS
from tests.unit.adapters.kernels.cases import CASES, EPSILON, Case, assert_within, make

BF16, F32 = torch.bfloat16, torch.float32
SOURCE = Path(native.__file__).with_name("native.cpp")
CODED = [
    *(c for c in CASES if c.format != "none"),
    Case("nf4", (65, 576), 16, 64),
    Case("int8", (48, 576), 3, 64),
    Case("nf3", (48, 576), 3, 64),
]

pytestmark = pytest.mark.skipif(native._library() is None, reason="no C++ compiler, or no ninja")


@pytest.fixture(params=["-mavx2", None], ids=["avx2", "plain"])
def other_capability(request, tmp_path, monkeypatch):
    """The functions as another CPU compiles them."""
    if request.param == "-mavx2" and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("this CPU has no AVX2")
    target = tmp_path / "native.so"
    flags = ["-O3", "-fopenmp", "-ffp-contract=off", "-std=c++20", "-shared", "-fPIC", "-Wall", "-Werror"]
    flags += [request.param] if request.param else []
    subprocess.run([shutil.which("c++") or "c++", *flags, SOURCE, "-o", target], check=True)
    library = native.declare(ctypes.CDLL(str(target)))
    monkeypatch.setattr(native, "_library", lambda: library)


def tiles_of(frozen, dtype, s_O, factor) -> torch.Tensor:
    found = tiles.adapted_tiles(frozen, dtype, s_O, factor=factor)
    return torch.cat([tile.clone() for _, tile in found])


def check_tiles(case: Case, monkeypatch) -> None:
    layer = make(case)
    monkeypatch.setattr("qdora.adapters.tiles.rows_per_tile", lambda *_: 13)
    written = []
    write = native.write_tile
    monkeypatch.setattr(native, "write_tile", lambda *given: written.append(write(*given)))
    for dtype in (F32, BF16):
        for s_O, factor in ((None, 1.0), (layer.s_O, 1.0), (layer.s_O, 1.841)):
            scaled_O = None if s_O is None else s_O * factor
            expected = torch.cat([tile for _, tile in layer.frozen.tiles(dtype, scaled_O)])
            assert torch.equal(tiles_of(layer.frozen, dtype, s_O, factor), expected)
    assert written


@pytest.mark.parametrize("case", CODED, ids=str)
def test_tiles_are_those_of_bitsandbytes(case: Case, monkeypatch):
    """Catches: nibbles in the wrong order, a neighbour's scale, one rounding instead of two, s applied
    twice or not at all, bf16 that is cut off."""
    check_tiles(case, monkeypatch)


@pytest.mark.parametrize("case", CODED[:3], ids=str)
@pytest.mark.usefixtures("other_capability")
def test_tiles_on_other_cpus(case: Case, monkeypatch):
    """Catches: a table read in the wrong half without AVX512, or values beyond the last full register."""
    check_tiles(case, monkeypatch)


def test_bf16_is_rounded_as_torch_does():
    """Catches: ties that go up, a NaN that becomes infinity, an overflow that does not."""
    edges = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, torch.inf, -torch.inf, torch.nan, 3.4e38, 1e-40, -0.0])
    s_O = torch.cat([edges, torch.randn(1000)])
    one = torch.ones_like(s_O)
    _, _, rounded = native.row_scale(one, one, torch.zeros_like(s_O), s_O[:, None], 1.0, BF16)
    assert rounded is not None
    torch.testing.assert_close(rounded[:, 0], s_O.to(BF16), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("shape", [(1, 7), (127, 129), (301, 65), (2048, 256)], ids=str)
def test_the_magnitudes_gradient_is_a_sum_over_tokens(shape, dtype):
    """Catches: tokens or columns beyond the last full block, a long sum in one chain, 0/0."""
    generator = torch.Generator().manual_seed(sum(shape))
    g_NO, y_NO = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    m_O = torch.rand(shape[1], generator=generator) + 0.5
    m_O[-1], y_NO[:, -1] = 0, 0
    grad_O, _ = kernels.output_gradients(g_NO, y_NO, m_O, None, None, 1.0)
    assert grad_O is not None
    exact = g_NO.double() * y_NO.double() / m_O.double().clamp_min(1e-30)
    assert_within(grad_O, (exact.sum(0), exact.abs().sum(0) * (18 + shape[0] / 16) * EPSILON))


def test_the_number_of_threads_changes_no_bit():
    """Catches: sums that are split by threads, so that a run goes on differently on another machine."""
    g_NO, y_NO, m_O = torch.randn(700, 300), torch.randn(700, 300), torch.rand(300) + 0.5
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(native.magnitude_gradient(g_NO, y_NO, m_O))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("product", [F32, BF16], ids=str)
@pytest.mark.parametrize("factor", [F32, BF16], ids=str)
@pytest.mark.parametrize("rank", [1, 16, 70])
def test_the_norm_is_that_of_the_sum(rank, factor, product):
    """Catches: the cross term once instead of twice, c not squared, factors read in the other's dtype."""
    generator = torch.Generator().manual_seed(rank)
    w_OI, a_RI, b_OR = (torch.randn(s, generator=generator) for s in ((90, 200), (rank, 200), (90, rank)))
    a_RI, b_OR, scale = a_RI / 10, b_OR.to(factor), 0.7
    w_OI[3] = -scale * b_OR[3].float() @ a_RI  # cancels: nothing is left of the row
    wa_OR = (w_OI @ a_RI.T).to(product)
    norm_O = factored_norm(w_OI.square().sum(1), wa_OR, a_RI, b_OR, scale)
    exact = w_OI.double() + scale * b_OR.double() @ a_RI.double()
    size = (w_OI.double().abs() + scale * b_OR.double().abs() @ a_RI.double().abs()).square().sum(1)
    rounding = (rank + 8) * EPSILON + (2.0**-8 if product == BF16 else 0)
    assert bool(((norm_O.double().square() - exact.square().sum(1)).abs() <= size * rounding).all())
    assert bool(norm_O.isfinite().all())
    assert bool((norm_O > 0).all())


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(("offset", "b"), [(F32, F32), (BF16, BF16), (BF16, F32)])
@pytest.mark.parametrize("rank", [1, 16, 600])
def test_row_scale_is_that_of_torch(rank, offset, b, dtype):
    """Catches: a rank beyond the buffer, B or the offset read in the other's dtype, f in s."""
    norm_O, initial_O = torch.rand(90) + 0.5, torch.rand(90) + 0.5
    offset_O, b_OR = (torch.randn(90) / 100).to(offset), torch.randn(90, rank).to(b)
    got = native.row_scale(norm_O, initial_O, offset_O, b_OR, 1.841, dtype)
    for one, expected in zip(
        got, reference.row_scale(norm_O, initial_O, offset_O, b_OR, 1.841, dtype), strict=True
    ):
        assert one is not None
        assert torch.equal(one, expected)
    assert native.row_scale(norm_O, initial_O, offset_O, None, 1.841, dtype)[2] is None


def test_what_is_left_to_torch():
    """Catches: an address asked of a fake tensor, rows read where columns are, float64 read as float32."""
    x = torch.randn(6, 4)
    assert native.takes((x,), (x.bfloat16(), None))
    assert native.takes((nn.Parameter(x),), codes=[x.to(torch.uint8)])
    for other in (x.T, x.double(), x.half(), x.to("meta"), x.to(torch.uint8)):
        assert not native.takes((), (other,))
    assert not native.takes((x.bfloat16(),))
    with FakeTensorMode(allow_non_fake_inputs=True):
        weight = QUANTIZATIONS["nf4"].from_dense(torch.empty(64, 128))
        assert not native.takes((torch.empty(3),))
        assert [tuple(t.shape) for _, t in tiles.adapted_tiles(weight, F32)] == [(64, 128)]


def test_without_a_compiler_torch_computes(monkeypatch, caplog):
    """Catches: a machine without a compiler, or with a broken one, on which nothing runs."""
    uncached = native._library.__wrapped__
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert uncached() is None
    monkeypatch.undo()
    monkeypatch.setenv("CXX", "false")
    monkeypatch.setattr(native, "NAME", "qdora_broken")
    with caplog.at_level(logging.WARNING):
        assert uncached() is None
    assert "torch computes" in caplog.text
    monkeypatch.undo()
    monkeypatch.setattr(native, "_library", lambda: None)
    layer = make(CODED[0])
    assert not native.takes((layer.s_O,))
    assert torch.equal(tiles_of(layer.frozen, F32, None, 1.0), layer.frozen.dense())


def test_a_build_that_was_killed_is_made_anew(monkeypatch, tmp_path):
    """Catches: every later run waiting for ever for the process that was killed while it compiled."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    name = Path(native._library()._name).stem.replace(native.NAME, "qdora_killed", 1)
    monkeypatch.setattr(native, "NAME", "qdora_killed")  # torch remembers what this process has built
    lock = tmp_path / name / "lock"
    lock.parent.mkdir()
    lock.touch()
    os.utime(lock, (0, 0))
    assert native._library.__wrapped__() is not None
    assert (tmp_path / name / f"{name}.so").exists()
    assert not lock.exists()
