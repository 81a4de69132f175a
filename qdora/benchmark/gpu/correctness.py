"""The kernels, and a layer in bf16, against float64.

N tokens   I in_features   O out_features   R rank
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from qdora.adapters import kernels
from qdora.benchmark.gpu.models import COMPUTE, STD
from qdora.benchmark.gpu.run import Figures, Setup, attempt
from qdora.benchmark.kept import METHODS, SIZES, Kept, build_layer, kept_shares, move, parts, relative_errors
from qdora.benchmark.peers import dequantize, linear_4bit
from qdora.config import QuantizationName
from qdora.quant import Quantization
from qdora.quant.base import FrozenWeight

BOUNDS = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 1e-5}
"""Relative error of a tile as a norm: one rounding to each dtype, with room."""
# Each line is a kernel that is compiled, for a second or two: the tests have all combinations.
FORMATS: Sequence[tuple[QuantizationName, bool, Sequence[torch.dtype]]] = (
    ("nf4", True, tuple(BOUNDS)),
    ("nf4", False, (COMPUTE,)),
    ("fp4", True, (COMPUTE,)),
    ("int8", True, (COMPUTE,)),
    ("none", False, (COMPUTE,)),
)
"""Formats of the weight, whether the scales are quantized too, and dtypes of the tile."""
SCALE = 1.7
CERTAIN = 0.02
"""Standard error up to which a kept share counts."""


def correctness(setup: Setup, figures: Figures) -> None:
    """Errors of the kernels, then what small moves of an adapter keep in bf16."""
    figures["on kernels"] = bool(kernels.available(setup.device))
    rows = figures["kernels"] = []
    # The second shape and rank are no multiple of any block.
    for shape, r in ((setup.size.shapes[-1], 16), ((257, 192), 5)):
        for quantization, double, dtypes in FORMATS:
            setup.clock.check()
            with attempt(figures, f"kernels on {quantization} {shape}"):
                torch.manual_seed(0)
                w_OI = torch.randn(shape, device=setup.device, dtype=COMPUTE) * STD
                weight = Quantization(quantization, double_quantization=double).from_dense(w_OI)
                checked = _check_weight(weight, r, dtypes)
                if quantization == "nf4" and double:
                    checked |= _check_bits(weight, w_OI)
                name = f"{quantization}{' double' if double else ''} {shape[0]}x{shape[1]}, r {r}"
                rows += [_row(what, name, *found) for what, found in checked.items()]
    with attempt(figures, "output_gradients"):
        _check_gradients(setup, rows)
    kept = figures["kept"] = []
    for method in METHODS:
        for trained, dropout in ((0.0, 0.0), (0.0, 0.1), (0.05, 0.0)):
            setup.clock.check()
            with attempt(figures, f"kept by {method}"):
                _measure_kept(setup, method, trained, dropout, kept)


def _row(what: str, of: str, error: float, bound: float) -> dict[str, Any]:
    return {"what": what, "of": of, "error": error, "bound": bound, "ok": error <= bound}


def _check_weight(
    weight: FrozenWeight, r: int, dtypes: Sequence[torch.dtype]
) -> dict[str, tuple[float, float]]:
    """Errors of tile and norm, and their bounds."""
    outputs, inputs = weight.out_features, weight.in_features
    device, stored = weight.device, weight.stored()
    assert stored is not None
    s_O = torch.rand(outputs, device=device) + 0.5
    a_RI = torch.randn(r, inputs, device=device, dtype=COMPUTE)
    b_OR = torch.randn(outputs, r, device=device, dtype=COMPUTE) * STD
    factors: Any = {"a_RI": a_RI, "b_OR": b_OR, "scale": SCALE}
    adapted_OI = weight.dense(torch.float32).double() + SCALE * b_OR.double() @ a_RI.double()
    found = {"row_norm": (_error(kernels.row_norm(stored, **factors), adapted_OI.norm(dim=1)), 1e-6)}
    for dtype in dtypes:
        tile = kernels.adapted_tile(stored, slice(0, outputs), dtype, s_O=s_O, **factors)
        found[f"tile, {dtype}"] = (_error(tile, s_O.double()[:, None] * adapted_OI), BOUNDS[dtype])
    return found


def _check_bits(weight: FrozenWeight, w_OI: torch.Tensor) -> dict[str, tuple[float, float]]:
    """How many values of a tile without update and scale are not bitsandbytes' to the bit."""
    stored, found = weight.stored(), {}
    assert stored is not None
    theirs = linear_4bit(w_OI, COMPUTE)
    for dtype in BOUNDS:
        tile = kernels.adapted_tile(stored, slice(0, weight.out_features), dtype)
        found[f"unlike bitsandbytes, {dtype}"] = (float((tile != dequantize(theirs, dtype)).sum()), 0.0)
    return found


def _check_gradients(setup: Setup, rows: list[dict[str, Any]]) -> None:
    torch.manual_seed(0)
    device, r, scale = setup.device, 16, 0.7
    for tokens, outputs in ((setup.size.tokens, setup.size.shapes[0][0]), (37, 257)):
        g_NO, y_NO, h_NR = (
            torch.randn(tokens, n, device=device, dtype=COMPUTE) for n in (outputs, outputs, r)
        )
        m_O, s_O = (torch.rand(outputs, device=device) + 0.5 for _ in range(2))
        of = f"{tokens}x{outputs}"
        exact = {
            "magnitude": (g_NO.double() * y_NO.double()).sum(0) / m_O.double(),
            "B": scale * s_O.double()[:, None] * (g_NO.double().T @ h_NR.double()),
        }
        first, second = (kernels.output_gradients(g_NO, y_NO, m_O, h_NR, s_O, scale) for _ in range(2))
        # The reference, which computes where there is no kernel, rounds the product for B to 16 bits.
        bounds = (1e-5, 1e-5 if kernels.available(device) else 2 * torch.finfo(COMPUTE).eps)
        for what, got, again, bound in zip(exact, first, second, bounds, strict=True):
            assert got is not None
            assert again is not None
            rows.append(_row(f"gradient of {what}", of, _error(got, exact[what]), bound))
            unlike = float((got != again).sum())
            rows.append(_row(f"gradient of {what}, unlike at a second call", of, unlike, 0.0))


def _measure_kept(
    setup: Setup, method: str, trained: float, dropout: float, rows: list[dict[str, Any]]
) -> None:
    outputs, inputs, tokens = setup.size.kept
    layer = build_layer(method, (outputs, inputs), setup.device, COMPUTE, trained=trained, dropout=dropout)
    torch.manual_seed(6)
    x_NI, g_NO = (torch.randn(tokens, n, device=setup.device, dtype=COMPUTE) for n in (inputs, outputs))
    worst = max(relative_errors(layer, x_NI, g_NO).values())
    for part in parts(method):
        for size in SIZES:
            shares = kept_shares(layer, x_NI, g_NO, move(layer, part, size))
            rows.append(
                {"layer": method, "trained": trained, "dropout": dropout, "move": part, "size": size}
                | {name.partition(".")[2] or name: kept.share for name, kept in shares.items()}
                | {"least certain one": least_certain(shares.values()), "total error": worst}
            )


def least_certain(shares: Iterable[Kept]) -> float | None:
    """The least share whose standard error is small; None where no one's is.  NaN keeps nothing."""
    certain = [0.0 if math.isnan(k.share) else k.share for k in shares if not k.error > CERTAIN]
    return min(certain, default=None)


def _error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())
