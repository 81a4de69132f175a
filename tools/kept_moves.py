"""How much of a small move of an adapter a bf16 layer keeps, and its error, held against float64.

    python -m tools.kept_moves [--device cuda] [--shape 1024 1024] [--tokens 512]

The share is that of output and input gradient, 1 where a move comes through (`qdora.benchmark.kept`).
"""

from __future__ import annotations

import argparse

import torch
from tabulate import tabulate

from qdora.benchmark.kept import METHODS, SIZES, build_layer, kept_shares, move, parts, relative_errors


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", type=int, nargs=2, default=(1024, 1024), metavar=("OUT", "IN"))
    parser.add_argument("--tokens", type=int, default=512)
    arguments = parser.parse_args()
    device, (outputs, inputs) = torch.device(arguments.device), arguments.shape
    generator = torch.Generator().manual_seed(0)
    x_NI, g_NO = (
        torch.randn(arguments.tokens, side, generator=generator).to(device, torch.bfloat16)
        for side in (inputs, outputs)
    )
    rows = []
    for method in METHODS:
        for dropout in (0.0, 0.1):
            layer = build_layer(method, (outputs, inputs), device, torch.bfloat16, dropout=dropout)
            for part in parts(method):
                kept = [kept_shares(layer, x_NI, g_NO, move(layer, part, size)) for size in SIZES]
                shares = [f"{k['y'].share:.3f}, {k['x'].share:.3f}" for k in kept]
                error = relative_errors(layer, x_NI, g_NO)["y"]
                rows.append([method, dropout, part, *shares, f"{error:.2e}"])
    sizes = [f"{size:g}: y, x" for size in SIZES]
    print(
        tabulate(
            rows, headers=["method", "dropout", "what moves", *sizes, "error of y"], disable_numparse=True
        )
    )


if __name__ == "__main__":
    main()
