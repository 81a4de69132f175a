"""The cheapest settings that fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from qdora.config import ModelConfig
from qdora.errors import InputError
from qdora.planner.simulate import Architecture, estimate, find_architecture
from qdora.planner.starter import choose

LENGTHS = [100] * 96 + [300] * 4
GIB = 2**30


@pytest.fixture(scope="module")
def architectures(tiny_model_folder: Path) -> dict[str, Architecture]:
    return {
        name: find_architecture(
            ModelConfig(path=str(tiny_model_folder), quantization=name), None, Path("x.yaml"), "cuda"
        )
        for name in ("none", "nf4")
    }


def test_settings_follow_the_memory(architectures: dict[str, Architecture]) -> None:
    """Catches: a dearer setting where a cheaper one fits, one that does not fit, recomputation where
    nothing is gained, examples left out before all else was tried, a length beyond the context."""
    first = choose(architectures, LENGTHS, 512, GIB, "cuda")
    assert (first.quantization, first.left_out, first.refused) == ("none", 0, {})
    assert (first.launch.max_length, first.launch.training.gradient_accumulation) == (320, 1)
    assert choose(architectures, LENGTHS, 256, GIB, "cuda").launch.max_length == 256
    assert choose(architectures, LENGTHS, 256, GIB, "cuda").left_out == 4
    seen, memory = [first], first.estimate.peak.total
    while True:
        try:
            found = choose(architectures, LENGTHS, 512, memory - 1, "cuda")
        except InputError:
            break
        assert found.estimate.peak.total < memory
        assert found.estimate == estimate(architectures[found.quantization], found.launch)
        memory = found.estimate.peak.total
        seen.append(found)
    with pytest.raises(InputError, match="no settings fit in"):
        choose(architectures, LENGTHS, 512, memory - 1, "cuda")
    order = [
        (
            s.left_out,
            s.quantization != "none",
            s.launch.checkpointing,
            s.launch.training.gradient_accumulation,
        )
        for s in seen
    ]
    assert order == sorted(order)
    assert order[-1][:3] == (4, True, True)
    assert seen[-1].launch.max_length == 128
    assert {s.launch.training.batch_size for s in seen} == {16}
