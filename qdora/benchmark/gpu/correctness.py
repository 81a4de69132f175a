"""The kernels, and a layer in bf16, against float64.

N tokens   I in_features   O out_features   R rank
"""

from __future__ import annotations

from typing import Any

import torch

from qdora.adapters import kernels
from qdora.benchmark.gpu.models import COMPUTE, STD
from qdora.benchmark.gpu.run import Figures, Setup, attempt
from qdora.benchmark.kept import METHODS, SIZES, build_layer, kept_shares, move, parts, relative_errors
from qdora.benchmark.peers import dequantize, linear_4bit
from qdora.quant import Quantization

FORMATS = (("nf4", True), ("nf4", False), ("fp4", True), ("int8", True), ("none", False))
"""Formats of the weight, and whether the scales are quantized too."""
RANKS = (16, 5)
BOUNDS = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 1e-5}
"""Relative error of a tile as a norm: one rounding to each dtype, with room."""
SCALE = 1.7
CERTAIN = 0.02
"""Standard error up to which a kept share counts."""


def correctness(setup: Setup, figures: Figures) -> None:
    """Errors of the kernels, then what small moves of an adapter keep in bf16."""
    figures["on kernels"] = bool(kernels.available(setup.device))
    rows = figures["kernels"] = []
    for shape in (setup.size.shapes[-1], (257, 192)):  # the second is no multiple of any block
        for quantization, double in FORMATS:
            setup.clock.check()
            with attempt(figures, f"kernels on {quantization} {shape}"):
                _check_weight(setup, shape, quantization, double, rows)
    with attempt(figures, "column_dot"):
        _check_column_dot(setup, rows)
    kept = figures["kept"] = []
    for method in METHODS:
        for trained, dropout in ((0.0, 0.0), (0.0, 0.1), (0.05, 0.0)):
            setup.clock.check()
            with attempt(figures, f"kept by {method}"):
                _measure_kept(setup, method, trained, dropout, kept)


def _check_weight(
    setup: Setup, shape: tuple[int, int], quantization: Any, double: bool, rows: list[dict[str, Any]]
) -> None:
    outputs, inputs = shape
    device = setup.device
    torch.manual_seed(0)
    w_OI = torch.randn(shape, device=device, dtype=COMPUTE) * STD
    weight = Quantization(quantization, double_quantization=double).from_dense(w_OI)
    stored, all_rows = weight.stored(), slice(0, outputs)
    assert stored is not None
    exact_OI = weight.dense(torch.float32).double()
    s_O = torch.rand(outputs, device=device) + 0.5
    where = f"{quantization}{' double' if double else ''} {outputs}x{inputs}"

    def row(what: str, value: float, bound: float) -> None:
        rows.append({"what": what, "of": where, "error": value, "bound": bound, "ok": value <= bound})

    for dtype, bound in BOUNDS.items():
        name = str(dtype).removeprefix("torch.")
        for r in RANKS:
            a_RI = torch.randn(r, inputs, device=device, dtype=COMPUTE)
            b_OR = torch.randn(outputs, r, device=device, dtype=COMPUTE) * STD
            adapted_OI = exact_OI + SCALE * b_OR.double() @ a_RI.double()
            factors: Any = {"a_RI": a_RI, "b_OR": b_OR, "scale": SCALE}
            got = kernels.adapted_tile(stored, all_rows, dtype, s_O=s_O, **factors)
            row(f"tile {name}, r {r}", _error(got, s_O.double()[:, None] * adapted_OI), bound)
            if dtype == torch.float32:
                row(
                    f"row_norm, r {r}",
                    _error(kernels.row_norm(stored, **factors), adapted_OI.norm(dim=1)),
                    1e-6,
                )
        if quantization == "nf4" and double and shape[0] * shape[1] % 64 == 0:
            same_OI = dequantize(linear_4bit(w_OI, dtype), dtype)
            unlike = float((kernels.adapted_tile(stored, all_rows, dtype) != same_OI).sum())
            row(f"tile {name}, values unlike bitsandbytes'", unlike, 0.0)


def _check_column_dot(setup: Setup, rows: list[dict[str, Any]]) -> None:
    torch.manual_seed(0)
    for tokens, outputs in ((setup.size.tokens, setup.size.shapes[0][0]), (37, 257)):
        g_NO, y_NO = (torch.randn(tokens, outputs, device=setup.device, dtype=COMPUTE) for _ in range(2))
        first, second = kernels.column_dot(g_NO, y_NO), kernels.column_dot(g_NO, y_NO)
        error = _error(first, (g_NO.double() * y_NO.double()).sum(0))
        of = f"{tokens}x{outputs}"
        rows.append({"what": "column_dot", "of": of, "error": error, "bound": 1e-5, "ok": error <= 1e-5})
        differing = float((first != second).sum())
        rows.append(
            {"what": "column_dot, second call", "of": of, "error": differing, "bound": 0, "ok": not differing}
        )


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
            certain = [kept.share for kept in shares.values() if kept.error <= CERTAIN]
            rows.append(
                {"layer": method, "trained": trained, "dropout": dropout, "move": part, "size": size}
                | {name.partition(".")[2] or name: kept.share for name, kept in shares.items()}
                | {"least certain one": min(certain, default=None), "total error": worst}
            )


def _error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())
