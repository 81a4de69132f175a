"""Times of our layers next to those of another checkout, alternating in one process.

    git worktree add /elsewhere COMMIT && python -m tools.layer_times /elsewhere

Milliseconds of forward and backward, medians, and the median over rounds of the ratio to the other's; B
counts as changed before every pass, so each norm is computed anew.
"""

from __future__ import annotations

import argparse
import importlib
import re
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qdora.resources import keep_freed_memory

SHAPES = {(4096, 4096, 256): 12, (576, 576, 512): 60, (1536, 576, 512): 60}
"""(out, in, tokens) and the number of rounds."""
OTHER = "other_qdora"


def import_other(checkout: Path, folder: Path) -> None:
    """Make the package of a checkout importable under another name."""
    shutil.copytree(checkout / "qdora", folder / OTHER, ignore=shutil.ignore_patterns("__pycache__"))
    for file in (folder / OTHER).rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        text = re.sub(r"^(\s*(?:from|import) )qdora\b", rf"\1{OTHER}", text, flags=re.MULTILINE)
        # Operators are registered once a process.
        file.write_text(re.sub(r'Library\("qdora"|ops\.qdora\.|"qdora::', _renamed, text), encoding="utf-8")
    sys.path.insert(0, str(folder))


def _renamed(found: re.Match[str]) -> str:
    return found[0].replace("qdora", OTHER)


def layer(package: str, outputs: int, inputs: int, dora: bool) -> Any:
    """An NF4 layer of one of the two packages, in training mode, B off zero."""
    torch.manual_seed(0)
    config = importlib.import_module(f"{package}.config").AdapterConfig
    adapted = importlib.import_module(f"{package}.adapters.layer").AdaptedLinear
    settings = config(r=16, alpha=32.0, dtype="float32", dora=dora)
    made = adapted.from_linear(nn.Linear(inputs, outputs, bias=False), settings).train()
    with torch.no_grad():
        made.update.b_OR.normal_(std=0.02)
    return made


def milliseconds(made: Any, x_NI: torch.Tensor, g_NO: torch.Tensor) -> float:
    """Of one pass."""
    trained = [p for p in made.parameters() if p.requires_grad]
    torch.autograd.graph.increment_version(trained)
    x = x_NI.detach().requires_grad_()
    started = time.perf_counter()
    torch.autograd.grad(made(x), [x, *trained], g_NO)
    return 1e3 * (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("other", type=Path, help="folder of the other checkout")
    other = parser.parse_args().other
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        import_other(other, Path(folder))
        for dtype in (torch.bfloat16, torch.float32):
            for name, dora in (("QDoRA", True), ("QLoRA", False)):
                for (outputs, inputs, tokens), rounds in SHAPES.items():
                    layers = [layer(package, outputs, inputs, dora) for package in ("qdora", OTHER)]
                    x_NI, g_NO = (torch.randn(tokens, side).to(dtype) for side in (inputs, outputs))
                    pairs = []
                    for i in range(rounds + 2):
                        order = (0, 1) if i % 2 else (1, 0)
                        times = {which: milliseconds(layers[which], x_NI, g_NO) for which in order}
                        pairs.append((times[0], times[1]))
                    own, others = (statistics.median(column) for column in zip(*pairs[2:], strict=True))
                    ratio = statistics.median(a / b for a, b in pairs[2:])
                    shape = f"{outputs} x {inputs}, {tokens} tokens"
                    print(
                        f"{dtype} {name} {shape}: {own:.2f}, other {others:.2f}, ratio {ratio:.3f}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
