"""What bf16 keeps of small moves, and the path with kernels on a CPU, where their reference computes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from qdora.adapters import kernels
from qdora.adapters.layer import AdaptedLinear
from qdora.adapters.tiles import OFF_GRID
from qdora.benchmark.kept import METHODS, SIZES, Part, build_layer, exact, kept_shares, move, parts
from qdora.quant import base as tiling
from tests import axes

from .oracle import assert_close, expected_gradients, gradients, move_off_the_identity, relative

O, I, N = 640, 512, 256
MOVES = [(method, part) for method in METHODS for part in parts(method)]
ADAPTED = [name for name, spec in axes.METHODS.items() if not spec.full]


@pytest.fixture(params=["torch", "kernels"])
def route(request, monkeypatch) -> str:
    """Tiles by bitsandbytes and torch, or by the kernels' operators."""
    if request.param == "kernels":
        monkeypatch.setattr(kernels, "available", lambda device: True)
    return request.param


def inputs(device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(N, side, generator=generator).to(device, torch.bfloat16) for side in (I, O))


def assert_moves_are_kept(method: str, part: Part, dropout: float, trained: float, device: str) -> None:
    layer = build_layer(
        method, (O, I), torch.device(device), torch.bfloat16, trained=trained, dropout=dropout
    )
    x_NI, g_NO = inputs(device)
    for size in SIZES:
        shares = kept_shares(layer, x_NI, g_NO, move(layer, part, size))
        assert {"y", "x"} <= shares.keys()
        for name, kept in shares.items():
            # Rounding that has nothing to do with the move is as large as the smallest ones.
            assert abs(kept.share - 1) <= 0.05 + 3 * kept.error, (size, name, shares)
        assert shares["y"].error < 0.05


@pytest.mark.parametrize("trained", [0.0, 0.03], ids=["start", "trained"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(("method", "part"), MOVES)
def test_small_moves_come_through(method, part, dropout, trained, route):
    """Catches: an update or a magnitude that acts on an output, an input or a weight that is rounded
    already; it keeps 0 to 15% of a move of 1e-4."""
    assert_moves_are_kept(method, part, dropout, trained, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("trained", [0.0, 0.03], ids=["start", "trained"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(("method", "part"), MOVES)
def test_small_moves_come_through_on_cuda(method, part, dropout, trained):
    """Catches: as above, in the kernels and in what cuBLAS adds onto."""
    assert_moves_are_kept(method, part, dropout, trained, "cuda")


@pytest.mark.parametrize(("method", "part"), MOVES)
def test_small_moves_come_through_in_float16(method, part):
    """Catches: a path that is taken in bfloat16 alone; the spacing of float16 is 5e-4 to 1e-3."""
    layer = build_layer(method, (O, I), torch.device("cpu"), torch.float16)
    x_NI, g_NO = (tensor.half() for tensor in inputs())
    kept = kept_shares(layer, x_NI, g_NO, move(layer, part, 1e-4))["y"]
    assert abs(kept.share - 1) <= 0.05 + 3 * kept.error
    assert kept.error < 0.02


def test_the_factor_keeps_moves_of_every_fraction():
    """Catches: another factor, at which the 128 fractions of bf16 fall unevenly between two numbers."""
    # Weights are spread as 1 / fraction within a binade, and each counts with its own size.
    fraction = torch.arange(128, 256, dtype=torch.float64) / 128
    start = (OFF_GRID * fraction).bfloat16().double()

    def kept(move: float) -> float:
        moved = (OFF_GRID * fraction * (1 + move)).bfloat16().double()
        return float((moved - start).sum() / (OFF_GRID * move * fraction.sum()))

    for size in (1e-4, 1.5e-4, 2e-4, 3e-4, 5e-4, 1e-3):
        assert abs(kept(size) - 1) <= 0.12
        assert abs(kept(-size) - 1) <= 0.12
        assert abs((kept(size) + kept(-size)) / 2 - 1) <= 0.05


@torch.no_grad()
def rounded_twice(layer: AdaptedLinear, x_NI: torch.Tensor) -> torch.Tensor:
    """The output with W x rounded before the update, and that before s."""
    w_OI = layer.base.dense(torch.float32).bfloat16()
    y_NO = x_NI @ w_OI.T
    h_NR = x_NI @ layer.update.a_RI.bfloat16().T * layer.update.scale
    y_NO.addmm_(h_NR, layer.update.b_OR.bfloat16().T)
    if layer.magnitude is not None:
        y_NO.mul_(layer.magnitude.value() / layer.weight_norm())
    return y_NO


@pytest.mark.parametrize("method", METHODS)
def test_the_error_is_no_larger(method, route):
    """Catches: small moves kept at the price of a noisier product."""
    layer = build_layer(method, (O, I), torch.device("cpu"), torch.bfloat16, trained=0.03)
    x_NI, g_NO = inputs()
    wanted = exact(layer, x_NI, g_NO)["y"]
    assert relative(layer(x_NI), wanted) <= 1.01 * relative(rounded_twice(layer, x_NI), wanted)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("norm", ["detached", "exact"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("method", ADAPTED)
def test_the_path_with_kernels_is_the_closed_form(method, dropout, norm, bias, monkeypatch):
    """Catches: an update in the tile and beside it, a factor that is not taken back, h of another scale,
    a last tile lost; in float32, where rounding hides nothing."""
    monkeypatch.setattr(kernels, "available", lambda device: True)
    monkeypatch.setitem(tiling.TILE_BYTES, "cpu", 24 * 7 * 4)
    torch.manual_seed(3)
    linear = nn.Linear(24, 40, bias=bias)
    config = axes.adapter_config(
        method=method, r=4, alpha=11.0, dtype="float32", norm_gradient=norm, dropout=dropout
    )
    layer = AdaptedLinear.from_linear(linear, config, quantization=axes.METHODS[method].quantization, seed=5)
    layer = move_off_the_identity(layer).eval()
    if dropout:
        monkeypatch.setattr("qdora.adapters.product.keep_mask", lambda like, *_: mask.to(like.dtype))
        layer.train()
    mask = (torch.rand(6, 24) > dropout) / (1 - dropout)
    x, g = torch.randn(6, 24), torch.randn(6, 40)
    expected = expected_gradients(layer, x, g, mask if dropout else None, exact=norm == "exact")
    assert_close(gradients(layer, x, g), expected, 1e-5)


@pytest.mark.parametrize("method", ["qdora", "qlora", "dora", "lora"])
def test_recomputed_activations_give_the_same_gradients(method, route):
    """Catches: a norm, a mask or a tile that differs between forward and its recomputation."""
    layer = build_layer(method, (O, I), torch.device("cpu"), torch.bfloat16, trained=0.03, dropout=0.1)
    x, g = inputs()
    trained = [p for p in layer.parameters() if p.requires_grad]

    def once(recompute: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        for parameter in trained:
            torch.autograd.graph.increment_version([parameter])
        y = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        return list(torch.autograd.grad(y, trained, g))

    assert all(torch.equal(a, b) for a, b in zip(once(True), once(False), strict=True))
