"""The measure of what small moves of an adapter keep."""

from __future__ import annotations

import pytest
import torch

from qdora.benchmark.kept import METHODS, build_layer, kept_shares, move, parts, relative_errors

CPU = torch.device("cpu")


def tensors(seed: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(256, 128, generator=generator), torch.randn(256, 192, generator=generator)


@pytest.mark.parametrize("trained", [0.0, 0.05])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("method", METHODS)
def test_float32_keeps_everything(method, dropout, trained):
    """Catches: an exact side that is another function than the layer's, of another mask or of a norm that is
    differentiated; a state that is not restored; a move that does not reach the parameters."""
    layer = build_layer(method, (192, 128), CPU, torch.float32, trained=trained, dropout=dropout)
    x_NI, g_NO = tensors()
    assert max(relative_errors(layer, x_NI, g_NO).values()) < 1e-5
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    for part in parts(method):
        shares = kept_shares(layer, x_NI, g_NO, move(layer, part, 1e-3))
        assert {"y", "x"} <= shares.keys()
        assert all(kept.share == pytest.approx(1, abs=2e-3) for kept in shares.values()), shares
        assert all(kept.error < 1e-3 for kept in shares.values()), shares
    assert all(torch.equal(p, before[name]) for name, p in layer.named_parameters())


@pytest.mark.parametrize("size", [1e-3, 1e-2])
def test_a_move_has_its_size(size):
    """Catches: a size that counts the scale c twice, or is of B rather than of the update."""
    layer = build_layer("qdora", (192, 128), CPU, torch.float32, trained=0.05)
    w_OI, update, magnitude = layer.base.dense(), layer.update, layer.magnitude
    moved = move(layer, "update", size)["update.b_OR"] - update.b_OR
    change = update.scale * (moved @ update.a_RI).detach().norm() / w_OI.norm()
    assert float(change) == pytest.approx(size, rel=1e-3)
    offset_O = move(layer, "magnitude", size)["magnitude.offset_O"]
    ratio_O = (magnitude.initial_O + offset_O) / magnitude.value()
    assert float((ratio_O - 1).abs().mean()) == pytest.approx(size, rel=1e-3)


@pytest.mark.parametrize(("roundings", "low", "high"), [(1, 0.9, 1.1), (2, -0.1, 0.2)])
def test_a_second_rounding_is_seen(roundings, low, high):
    """Catches: a measure to which an output that rounds the update away looks as good as any."""
    layer = build_layer("qlora", (192, 128), CPU, torch.float32)

    def rounded(layer, args, y):
        if roundings == 1:
            return y.bfloat16().float()
        plain = args[0] @ layer.base.dense().T
        return (plain.bfloat16() + (y - plain).bfloat16()).float()

    layer.register_forward_hook(rounded)
    assert low < kept_shares(layer, *tensors(), move(layer, "update", 1e-4))["y"].share < high
