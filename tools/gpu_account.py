"""What the adapted layers of LLaMA-3-8B ask of a GPU in a training step: launches, bytes, flops and time.

    python -m tools.gpu_account [--tokens 2048] [--without-kernels] [--operators]

Forward and backward of each layer run on fake tensors, and every operator that is no view counts as one
launch that reads its inputs and writes its outputs once.  The time is a lower bound: of each launch the
larger of bytes over the bandwidth and flops over the rate of an H100.  No GPU is needed.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from tabulate import tabulate
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qdora.adapters import kernels, product
from qdora.adapters.layer import AdaptedLinear
from qdora.config import AdapterConfig
from qdora.planner.internals import fake_tensors
from qdora.quant import Quantization
from qdora.quant.base import TILE_BYTES

LAYERS = 32
SHAPES: Mapping[tuple[int, int], int] = {
    (4096, 4096): 2,
    (1024, 4096): 2,
    (14336, 4096): 2,
    (4096, 14336): 1,
}
"""(out, in) of the linear layers of a decoder layer, and how many there are."""
BANDWIDTH, RATE = 2.9e12, 6.5e14
"""Bytes and bf16 flops a second."""
LAUNCHES = {"output_gradients": 2}
"""Launches of an operator, where they are more than one."""


@dataclass
class Account(TorchDispatchMode):
    """Counts what runs inside of it."""

    launches: int = 0
    bytes: int = 0
    flops: int = 0
    seconds: float = 0.0
    names: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name().split("::")[1].split(".")[0]
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        if func.is_view or not made or name in ("empty", "new_empty", "empty_like", "detach", "_unsafe_view"):
            return result
        written = sum(t.nbytes for t in made)
        ignored = name.startswith("addmm") and (kwargs or {}).get("beta") == 0
        read = sum(t.nbytes for t in given[ignored:])
        flops = 0
        if name in ("mm", "addmm", "addmm_"):
            left, right = args[:2] if name == "mm" else args[1:3]
            flops = 2 * left.shape[0] * left.shape[1] * right.shape[1]
        if name == "output_gradients" and args[3] is not None:
            flops = 2 * args[0].numel() * args[3].shape[1]
        self.launches += LAUNCHES.get(name, 1)
        self.names[name] = self.names.get(name, 0) + 1
        self.bytes += read + written
        self.flops += flops
        self.seconds += max((read + written) / BANDWIDTH, flops / RATE)
        return result


def account(shape: tuple[int, int], tokens: int, dora: bool) -> Account:
    """One layer, forward and backward, its norm computed anew."""
    torch.manual_seed(0)
    weight = Quantization("nf4").on_meta(shape, torch.bfloat16)
    weight.assign({name: torch.empty(t.shape, dtype=t.dtype) for name, t in weight.state_dict().items()})
    layer = AdaptedLinear(weight)
    layer.add_adapter(AdapterConfig(dora=dora, r=16, alpha=32.0))
    x, g = torch.randn(tokens, shape[1]).bfloat16().requires_grad_(), torch.randn(tokens, shape[0]).bfloat16()
    for parameter in layer.parameters():
        torch.autograd.graph.increment_version([parameter])
    counted = Account()
    with counted:
        torch.autograd.grad(layer(x), [x, *(p for p in layer.parameters() if p.requires_grad)], g)
    return counted


def mm_wide(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """As on a GPU, where the product leaves in float32."""
    return torch.mm(left, right, out_dtype=torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument(
        "--without-kernels", action="store_true", help="tiles by bitsandbytes, as without Triton"
    )
    parser.add_argument("--operators", action="store_true", help="list them")
    arguments = parser.parse_args()
    TILE_BYTES["cpu"] = TILE_BYTES["cuda"]
    if not arguments.without_kernels:
        kernels.available = lambda device: True
    product.mm_wide = mm_wide
    for name, dora in (("QDoRA", True), ("QLoRA", False)):
        rows, totals = [], [0.0] * 4
        for shape, count in SHAPES.items():
            with fake_tensors():
                one = account(shape, arguments.tokens, dora)
            values = [one.launches, one.bytes / 1e6, one.flops / 1e9, one.seconds * 1e3]
            rows.append([f"{shape[0]} x {shape[1]}", *values])
            totals = [total + LAYERS * count * value for total, value in zip(totals, values, strict=True)]
            if arguments.operators and shape == (4096, 4096):
                print(", ".join(f"{count} {operator}" for operator, count in one.names.items()))
        rows.append(["all of 32 decoder layers", *totals])
        print(f"{name}, {arguments.tokens} tokens")
        print(tabulate(rows, headers=["layer", "launches", "MB", "GFLOP", "ms"], floatfmt=".1f"), "\n")


if __name__ == "__main__":
    main()
