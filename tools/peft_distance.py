"""How far accelerated layers are from float64 in bf16, over how far PEFT's own are (docs/peft.md).

    python -m tools.peft_distance

Of the output, and of all gradients together: two small layers, means of five inputs, on a CPU and with the
roundings of a GPU.
"""

from __future__ import annotations

import argparse
import math
from statistics import mean

from tabulate import tabulate

from tests.unit.adapters.accelerated import BASES, SIXTEEN_BITS, as_on_cuda, distances


def ratios(base: str, how: str) -> list[float]:
    """Of the output's and the gradients' distance, ours over PEFT's."""
    outputs, gradients = [], []
    for seed in range(5):
        errors = distances(base, how, seed)
        outputs.append(errors.pop("y"))
        gradients.append([math.hypot(*side) for side in zip(*errors.values(), strict=True)])
    return [
        mean(ours) / mean(theirs)
        for ours, theirs in (zip(*both, strict=True) for both in (outputs, gradients))
    ]


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    rows = []
    for device in ("cpu", "gpu"):
        if device == "gpu":
            for module, name, value in as_on_cuda():
                setattr(module, name, value)
        rows += [(device, how, base, *ratios(base, how)) for how in SIXTEEN_BITS for base in BASES]
    print(tabulate(rows, headers=["as on", "bf16", "base", "output", "gradients"], floatfmt=".2f"))


if __name__ == "__main__":
    main()
