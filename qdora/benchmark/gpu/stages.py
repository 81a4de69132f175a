"""The stages of the measurement, the most telling first: a time limit cuts the last ones off."""

from __future__ import annotations

from collections.abc import Mapping

from qdora.benchmark.gpu.commands import demo, fsdp, gpu_tests
from qdora.benchmark.gpu.correctness import correctness
from qdora.benchmark.gpu.full_model import decoding, training
from qdora.benchmark.gpu.kernels import ceilings, kernel_times
from qdora.benchmark.gpu.run import Stage
from qdora.benchmark.gpu.steps import profile_step, steps

STAGES: Mapping[str, Stage] = {
    "ceilings": ceilings,
    "correctness": correctness,
    "kernels": kernel_times,
    "steps": steps,
    "profile": profile_step,
    "training": training,
    "fsdp": fsdp,
    "decoding": decoding,
    "tests": gpu_tests,
    "demo": demo,
}
