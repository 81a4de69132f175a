"""How much of a small move of an adapter its layer's outputs and gradients keep, held against float64.

A layer that rounds to the compute dtype more than once rounds small moves away, though its total error
looks as ever: a second rounding of a number that is on the grid already falls back to the same point of it.

N tokens   I in_features   O out_features   R rank
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import nn

from qdora.adapters.dropout import draw_seed, keep_mask
from qdora.adapters.layer import AdaptedLinear
from qdora.adapters.lora import LoraUpdate
from qdora.config import AdapterConfig, QuantizationName

METHODS: dict[str, tuple[QuantizationName, bool]] = {
    "qdora": ("nf4", True),
    "qlora": ("nf4", False),
    "dora": ("none", True),
    "lora": ("none", False),
}
"""Format of the frozen weight, and whether there is a magnitude."""

SIZES = (1e-4, 1e-3, 1e-2)
"""Relative sizes of the moves that are measured."""

Part = Literal["update", "magnitude"]


def parts(method: str) -> tuple[Part, ...]:
    """What can move in a layer of a method."""
    return ("update", "magnitude") if METHODS[method][1] else ("update",)


class Kept(NamedTuple):
    """The least-squares slope of a measured change on the exact one.

    Attributes:
        share: <Δ, Δexact> / <Δexact, Δexact>: 1 where the change came through, 0 where it was rounded away.
        error: standard error of the share, of rounding that has nothing to do with the change.
    """

    share: float
    error: float


def build_layer(
    method: str,
    shape: tuple[int, int],
    device: torch.device,
    compute: torch.dtype,
    *,
    trained: float = 0.0,
    dropout: float = 0.0,
) -> AdaptedLinear:
    """A random layer in training mode.

    Args:
        method: of `METHODS`.
        shape: (O, I).
        compute: dtype of a weight that is not quantized.
        trained: how far the adapter is from its start: ||c BA|| / ||W||, and |m - norm| / norm.  At the start
            an output without the move is on the grid of the compute dtype, where a second rounding keeps it.
    """
    quantization, dora = METHODS[method]
    generator = torch.Generator().manual_seed(1)
    linear = nn.Linear(shape[1], shape[0], bias=False, device="meta")
    w_OI = (torch.randn(shape, generator=generator) * 0.02).to(device, compute)
    linear.weight = nn.Parameter(w_OI, requires_grad=False)
    # Float32: what storage rounds is another matter.
    config = AdapterConfig(dora=dora, r=16, alpha=32.0, dropout=dropout, dtype="float32")
    layer = AdaptedLinear.from_linear(linear, config, quantization=quantization, seed=2)
    with torch.no_grad():
        for part in parts(method):
            for name, value in move(layer, part, trained, seed=3).items():
                layer.get_parameter(name).copy_(value)
    return layer.train()


@torch.no_grad()
def move(layer: AdaptedLinear, part: Part, size: float, *, seed: int = 4) -> dict[str, torch.Tensor]:
    """New values of the parameter that a move changes, by its name in the layer.

    Args:
        part: `update`: B changes so that ||c ΔB A|| = size ||W||; `magnitude`: m of each row by the factor
            1 ± size.
    """
    generator = torch.Generator().manual_seed(seed)
    if part == "magnitude":
        assert layer.magnitude is not None
        assert layer.magnitude.offset_O is not None
        sign_O = torch.randint(2, (layer.out_features,), generator=generator).to(layer.base.device) * 2 - 1
        offset_O = layer.magnitude.offset_O
        return {"magnitude.offset_O": offset_O + (size * sign_O * layer.magnitude.value()).to(offset_O.dtype)}
    assert isinstance(layer.update, LoraUpdate)
    b_OR = layer.update.b_OR
    step_OR = torch.randn(b_OR.shape, generator=generator).to(layer.base.device)
    w2 = sum(float(tile.square().sum()) for _, tile in layer.base.tiles(torch.float32))
    moved = layer.update.scale * float((step_OR @ layer.update.a_RI.float()).norm())
    return {"update.b_OR": b_OR + (step_OR * (size * w2**0.5 / moved)).to(b_OR.dtype)}


def kept_shares(
    layer: AdaptedLinear, x_NI: torch.Tensor, g_NO: torch.Tensor, moved: Mapping[str, torch.Tensor]
) -> dict[str, Kept]:
    """What output and gradients keep of a move of the adapter.

    Args:
        layer: with LoRA's update; its state is the start, and is there again afterwards.
        x_NI, g_NO: input and gradient of the output, in the compute dtype.
        moved: of `move`.
    Returns: of the output `y`, of the gradients of `x` and of each trained parameter by its name; none of
        what the move does not change.
    """
    before, exact_before = measured(layer, x_NI, g_NO), exact(layer, x_NI, g_NO)
    with _moved(layer, moved):
        after, exact_after = measured(layer, x_NI, g_NO), exact(layer, x_NI, g_NO)
    shares = {}
    for name, start in exact_before.items():
        change = (exact_after[name] - start).flatten()
        if float(change.norm()) > 1e-10 * float(start.norm()):
            got = (after[name].double() - before[name].double()).flatten()
            square = float(change @ change)
            share = float(got @ change) / square
            rest = float((got - share * change).norm())
            shares[name] = Kept(share, rest / (square * max(1, change.numel() - 1)) ** 0.5)
    return shares


def relative_errors(layer: AdaptedLinear, x_NI: torch.Tensor, g_NO: torch.Tensor) -> dict[str, float]:
    """||got - exact|| / ||exact|| of output and gradients but those that are 0, named as in `kept_shares`."""
    got, wanted = measured(layer, x_NI, g_NO), exact(layer, x_NI, g_NO)
    return {n: float((got[n].double() - w).norm() / w.norm()) for n, w in wanted.items() if w.any()}


_SEED = 5
"""Of the dropout mask, the same in all passes."""


def measured(layer: AdaptedLinear, x_NI: torch.Tensor, g_NO: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output and gradients of the layer, by the names of `kept_shares`."""
    torch.manual_seed(_SEED)
    x_NI = x_NI.detach().clone().requires_grad_()
    trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    y_NO = layer(x_NI)
    gradients = torch.autograd.grad(y_NO, [x_NI, *trained.values()], g_NO)
    return {"y": y_NO.detach(), **dict(zip(["x", *trained], gradients, strict=True))}


def exact(layer: AdaptedLinear, x_NI: torch.Tensor, g_NO: torch.Tensor) -> dict[str, torch.Tensor]:
    """What `measured` would be in float64: the formula written out, W as its float32 code times scale."""
    update = layer.update
    assert isinstance(update, LoraUpdate)
    torch.manual_seed(_SEED)
    w_OI = layer.base.dense(torch.float32).double()
    x_NI, a_RI, b_OR = (t.detach().double().requires_grad_() for t in (x_NI, update.a_RI, update.b_OR))
    inputs = {"x": x_NI, "update.a_RI": a_RI, "update.b_OR": b_OR}
    kept_NI = x_NI
    if update.dropout and layer.training:
        kept_NI = x_NI * keep_mask(x_NI.detach(), layer.in_features, update.dropout, draw_seed())
    y_NO = x_NI @ w_OI.T + update.scale * (kept_NI @ a_RI.T) @ b_OR.T
    if layer.magnitude is not None and layer.magnitude.offset_O is not None:
        norm_O = (w_OI + update.scale * b_OR.detach() @ a_RI.detach()).norm(dim=1)
        offset_O = layer.magnitude.offset_O.detach().double().requires_grad_()
        inputs["magnitude.offset_O"] = offset_O
        y_NO = y_NO * ((layer.magnitude.initial_O.double() + offset_O) / norm_O)
    gradients = torch.autograd.grad(y_NO, list(inputs.values()), g_NO.double())
    return {"y": y_NO.detach(), **dict(zip(inputs, gradients, strict=True))}


@contextmanager
def _moved(layer: AdaptedLinear, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    parameters = {name: layer.get_parameter(name) for name in values}
    start = {name: p.detach().clone() for name, p in parameters.items()}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(start[name])
