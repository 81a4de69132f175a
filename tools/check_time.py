"""CPU seconds of the memory check for a run that does not fit, imports left out (docs/memory.md).

python -m tools.check_time [--batch-size 1024] [--gpus 8] [--profile]

The estimate of the worst batch of configs/llama3-8b-orca-math.yaml, and the settings that mend it.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import time
from contextlib import nullcontext
from pathlib import Path

from qdora.config import RunConfig
from qdora.config_file import load_config
from qdora.distributed.launch import FsdpSettings
from qdora.planner.advise import mend
from qdora.planner.architecture import find_architecture
from qdora.planner.shorten import estimate
from qdora.planner.simulate import Launch
from qdora.resources import show_size

CONFIG = Path(__file__).parents[1] / "configs" / "llama3-8b-orca-math.yaml"
MEMORY = 24 << 30


def main() -> None:
    """Print the seconds of the estimate, and of what mends the run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--gpus", type=int, default=1, help="sharded where several")
    parser.add_argument("--profile", action="store_true", help="and the functions that take longest")
    options = parser.parse_args()
    config: RunConfig = load_config(CONFIG)
    training = config.training.model_copy(
        update={"batch_size": options.batch_size, "gradient_accumulation": 1}
    )
    fsdp = FsdpSettings() if options.gpus > 1 else None
    launch = Launch(config.adapter, training, config.data.max_length, options.gpus, fsdp)
    architecture = find_architecture(config.model, None, "cuda")
    with cProfile.Profile() if options.profile else nullcontext() as profile:
        started = time.process_time()
        now = estimate(architecture, launch)
        estimated = time.process_time()
        proposal = mend(architecture, launch, now, MEMORY)
        mended = time.process_time()
    what = "nothing" if proposal is None else proposal.change.settings
    print(
        f"{options.gpus} GPUs, batch {options.batch_size}: {show_size(now.peak.total)} in "
        f"{estimated - started:.1f} s; {what} in {mended - estimated:.1f} s more; "
        f"{mended - started:.1f} s of CPU in all"
    )
    if profile is not None:
        pstats.Stats(profile).sort_stats("tottime").print_stats(45)


if __name__ == "__main__":
    main()
