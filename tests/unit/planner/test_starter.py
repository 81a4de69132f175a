"""The cheapest settings that fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qdora.config import ModelConfig
from qdora.errors import InputError
from qdora.planner import advise
from qdora.planner.architecture import Architecture, find_architecture
from qdora.planner.shorten import estimate
from qdora.planner.simulate import Launch
from qdora.planner.starter import EFFICIENT_TOKENS, _max_lengths, choose

LENGTHS = [60] * 96 + [120] * 4
GIB = 2**30


@pytest.fixture
def architectures(tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[Any, Architecture]:
    """In both formats; each estimate is made once."""
    made: dict[Any, Any] = {}

    def once(architecture: Architecture, launch: Launch) -> Any:
        key = (architecture.quantization.name, launch.max_length, launch.training.model_dump_json())
        if key not in made:
            made[key] = estimate(architecture, launch)
        return made[key]

    monkeypatch.setattr(advise, "estimate", once)
    model = ModelConfig(path=str(tiny_model_folder))
    return {
        name: find_architecture(model.model_copy(update={"quantization": name}), None, "cuda")
        for name in ("none", "nf4")
    }


def test_settings_follow_the_memory(architectures: dict[Any, Architecture]) -> None:
    """Catches: a dearer setting where a cheaper one fits, one that does not fit, recomputation where nothing
    is gained, examples left out before all else was tried, a length beyond the context."""
    first = choose(architectures, LENGTHS, 512, GIB, "cuda")
    assert (first.quantization, first.left_out, first.refused) == ("none", 0, {})
    assert (first.launch.max_length, first.launch.training.gradient_accumulation) == (128, 1)
    assert choose(architectures, LENGTHS, 100, GIB, "cuda").launch.max_length == 100
    assert choose(architectures, LENGTHS, 100, GIB, "cuda").left_out == 4
    seen = [first]
    for _ in range(40):
        memory = seen[-1].estimate.peak.total - 1
        try:
            seen.append(choose(architectures, LENGTHS, 512, memory, "cuda"))
        except InputError:
            break
        assert seen[-1].estimate.peak.total <= memory
    with pytest.raises(InputError, match="no settings fit in"):
        choose(architectures, LENGTHS, 512, memory, "cuda")
    order = [
        (s.left_out, s.quantization != "none", s.launch.checkpointing, s.launch.micro_batch_size)
        for s in seen
    ]
    assert order == sorted(order, key=lambda key: (*key[:3], -key[3]))
    assert order[-1] == (4, True, True, 1)
    assert {s.launch.training.batch_size for s in seen} == {16}
    for one in seen:
        assert not (one.quantization == "none" and one.launch.checkpointing)
        tokens = one.launch.micro_batch_size * one.launch.max_length
        at_once = one.launch.training.gradient_accumulation == 1
        assert one.launch.checkpointing or at_once or tokens >= EFFICIENT_TOKENS


def test_lengths_are_clearly_shorter() -> None:
    """Catches: examples left out for a length that saves next to nothing."""
    assert list(_max_lengths([640] * 98 + [700, 704], None)) == [704]
    assert list(_max_lengths([400] * 98 + [700, 704], None)) == [704, 448]
